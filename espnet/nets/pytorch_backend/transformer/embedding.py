"""Sinusoidal position encodings, absolute and relative."""

import math

import torch
from torch import Tensor, nn


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Sine (even features) and cosine (odd features) of positions at geometric wavelengths.

    Source: Vaswani et al., Attention Is All You Need, 2017, section 3.5.

    Args:
        positions: Positions, (T,) float32; may be negative.
        dim: Feature size D, even.

    Returns:
        Encodings, (T, D).
    """
    rates = torch.exp(
        torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
        * (-math.log(10000.0) / dim)
    )
    angles = positions.unsqueeze(1) * rates  # (T, D/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (T, D/2, 2) -> (T, D)


class PositionalEncoding(nn.Module):
    """Adds the encoding of absolute positions to scaled features.

    Args:
        dim: Feature size D.
        dropout_rate: Dropout on the sum.
    """

    def __init__(self, *, dim: int, dropout_rate: float) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Encodes positions offset, offset + 1, ...

        Args:
            x: Features, (B, T, D).
            offset: Position of the first frame.

        Returns:
            sqrt(D)·x + encoding, (B, T, D).
        """
        positions = torch.arange(offset, offset + x.size(1), device=x.device, dtype=torch.float32)
        encoding = sinusoids(positions, self.dim).to(x.dtype)
        return self.dropout(x * math.sqrt(self.dim) + encoding)


class RelPositionalEncoding(nn.Module):
    """Scales features and gives the encodings of all distances between their frames.

    Source: Dai et al., Transformer-XL, 2019, section 3.3.

    Args:
        dim: Feature size D.
        dropout_rate: Dropout on features and encodings.
    """

    def __init__(self, *, dim: int, dropout_rate: float) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Scales features, (..., D), by sqrt(D)."""
        return self.dropout(x * math.sqrt(self.dim))

    def distances(self, x: Tensor) -> Tensor:
        """Encodes distances T - 1, ..., -(T - 1), query minus key.

        Args:
            x: Features, (B, T, D), whose frames they lie between.

        Returns:
            Encodings, (2T - 1, D).
        """
        length = x.size(1)
        distances = torch.arange(length - 1, -length, -1, device=x.device, dtype=torch.float32)
        return self.dropout(sinusoids(distances, self.dim).to(x.dtype))
