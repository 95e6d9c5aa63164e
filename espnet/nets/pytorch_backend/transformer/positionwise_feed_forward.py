"""The feed-forward block of a Transformer."""

import torch.nn.functional as F
from torch import Tensor, nn


class PositionwiseFeedForward(nn.Module):
    """Two linear layers with ReLU and dropout in between, applied to each frame.

    Args:
        dim: Feature size D.
        hidden_units: Units of the hidden layer.
        dropout_rate: Dropout on the hidden layer.
    """

    def __init__(self, *, dim: int, hidden_units: int, dropout_rate: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(dim, hidden_units)
        self.w_2 = nn.Linear(hidden_units, dim)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, T, D) to (B, T, D)."""
        return self.w_2(self.dropout(F.relu(self.w_1(x))))
