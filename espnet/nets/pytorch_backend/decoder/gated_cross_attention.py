"""Attention to a second memory for a pretrained decoder block, behind gates that start closed."""

import torch
from torch import Tensor, nn

from espnet.nets.pytorch_backend.transformer.attention import MultiHeadedAttention


class GatedCrossAttention(nn.Module):
    """x + tanh(g)·attention(norm(x), memory), then x + tanh(g')·feed_forward(norm(x)).

    Source: Alayrac et al., Flamingo, 2022. Both gates start at zero, where it passes x on as it
    is, so that a pretrained decoder starts out as what it was.

    The result has the precision of x, whatever that of these weights.

    Args:
        dim: Feature size D of the decoder, a multiple of `heads`.
        memory_dim: Feature size M of the memory.
        heads: Attention heads H.
        dropout_rate: Dropout on both branches, and on the feed-forward block's hidden layer.

    Raises:
        ValueError: If `dim` is no multiple of `heads`.
    """

    def __init__(self, dim: int, memory_dim: int, heads: int, dropout_rate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = MultiHeadedAttention(heads=heads, dim=dim)
        self.attention.linear_k = nn.Linear(memory_dim, dim)
        self.attention.linear_v = nn.Linear(memory_dim, dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout_rate), nn.Linear(4 * dim, dim)
        )
        self.gate = nn.Parameter(torch.zeros(()))
        self.feed_forward_gate = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """Attends to a memory and applies the feed-forward block.

        Args:
            x: Token features, (N, U, D), N / B sequences for each utterance, one after another.
            memory: Features, (B, T, M).
            memory_mask: Real frames, (B, T), or None if all are real.

        Returns:
            Token features, (N, U, D).
        """
        keys, values = self.project_memory(memory)
        return self.attend(x, keys, values, memory_mask, len(x) // max(len(memory), 1))

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory, for attending to it again and again.

        Args:
            memory: Features, (B, T, M).

        Returns:
            Keys and values, each (B, H, T, D/H).
        """
        return self.attention.project_memory(memory.to(self.gate.dtype))

    def attend(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, beam_size: int
    ) -> Tensor:
        """Does what `forward` does, with a memory that is already projected.

        The sequences of an utterance attend to its one memory as one sequence of K·U queries.

        Args:
            x: Token features, (B·K, U, D).
            keys: Keys, (B, H, T, D/H).
            values: Values, (B, H, T, D/H).
            mask: Real frames, (B, T), or None if all are real.
            beam_size: Sequences for each utterance, K.

        Returns:
            Token features, (B·K, U, D).
        """
        _, length, dim = x.shape
        normed = self.norm(x.to(self.gate.dtype))
        queries = normed.reshape(-1, beam_size * length, dim)  # (B·K, U, D) -> (B, K·U, D)
        mask = None if mask is None else mask[:, None, None]  # (B, T) -> (B, 1, 1, T)
        attended = self.attention.attend(queries, keys, values, mask).reshape(x.shape)
        x = x + (self.gate.tanh() * self.dropout(attended)).to(x.dtype)
        mapped = self.feed_forward(self.feed_forward_norm(x.to(self.gate.dtype)))
        return x + (self.feed_forward_gate.tanh() * self.dropout(mapped)).to(x.dtype)
