"""Multi-head attention, plain and with relative positions."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.real_frames import RealFrames


class MultiHeadedAttention(nn.Module):
    """Scaled dot-product attention with H heads.

    Args:
        heads: Number of heads H.
        dim: Feature size D, a multiple of H.

    Raises:
        ValueError: If `dim` is no multiple of `heads`.
    """

    def __init__(self, *, heads: int, dim: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(
                f"attention size {dim} is no multiple of {heads} heads: change one of them"
            )
        self.heads = heads
        self.linear_q = nn.Linear(dim, dim)
        self.linear_k = nn.Linear(dim, dim)
        self.linear_v = nn.Linear(dim, dim)
        self.linear_out = nn.Linear(dim, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, D/H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory, for attending to it again and again.

        Args:
            memory: Features, (B, T, D).

        Returns:
            Keys and values, each (B, H, T, D/H).
        """
        return self.split_heads(self.linear_k(memory)), self.split_heads(self.linear_v(memory))

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention to keys and values that are already projected.

        Args:
            query: Features, (B, Q, D).
            keys: Keys, (B, H, T, D/H).
            values: Values, (B, H, T, D/H).
            mask: Broadcastable to (B, H, Q, T), True is attended to; or None for everything.
            is_causal: Query i sees keys 0 to i only.

        Returns:
            Features, (B, Q, D).
        """
        queries = self.split_heads(self.linear_q(query))
        context = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=is_causal
        )
        return self.linear_out(context.transpose(1, 2).flatten(2))  # (B, H, Q, D/H) -> (B, Q, D)

    def attend_by_pieces(self, query: Tensor, pieces: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Attention to keys and values that come for some sequences at a time.

        Args:
            query: Features, (B, Q, D).
            pieces: Keys and values, each (B', H, T, D/H), of the next B' sequences, until there
                are B.

        Returns:
            Features, (B, Q, D).
        """
        queries = self.split_heads(self.linear_q(query))
        contexts, first = [], 0
        for keys, values in pieces:
            some = queries[first : first + len(keys)]
            contexts.append(F.scaled_dot_product_attention(some, keys, values))
            first += len(keys)
        context = torch.cat(contexts) if len(contexts) > 1 else contexts[0]
        return self.linear_out(context.transpose(1, 2).flatten(2))  # (B, H, Q, D/H) -> (B, Q, D)

    def forward(
        self, query: Tensor, memory: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
    ) -> Tensor:
        """Attention of a query to a memory.

        Args:
            query: Features, (B, Q, D).
            memory: Features, (B, T, D).
            mask: Broadcastable to (B, H, Q, T), True is attended to; or None for everything.
            is_causal: Query i sees memory 0 to i only.

        Returns:
            Features, (B, Q, D).
        """
        return self.attend(query, *self.project_memory(memory), mask, is_causal=is_causal)


class RelPositionMultiHeadedAttention(MultiHeadedAttention):
    """Self-attention whose scores also depend on the distance of query and key.

    Source: Dai et al., Transformer-XL, 2019, section 3.3. The term of the distance enters
    PyTorch's fused attention as an additive bias.

    Args:
        heads: Number of heads H.
        dim: Feature size D, a multiple of H.
    """

    def __init__(self, *, heads: int, dim: int) -> None:
        super().__init__(heads=heads, dim=dim)
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, dim // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, dim // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(self, x: Tensor, encoding: Tensor, real: RealFrames) -> Tensor:
        """Self-attention within each utterance.

        Args:
            x: Features of real frames, (N, D).
            encoding: Encodings of distances T - 1, ..., -(T - 1), (2T - 1, D).
            real: Where these frames are.

        Returns:
            Features, (N, D).
        """
        queries, keys, values = (
            self.split_heads(real.pad(linear(x)))  # (N, D) -> (B, H, T, D/H)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        distances = self.split_heads(self.linear_pos(encoding).unsqueeze(0))  # (1, H, 2T-1, D/H)
        scale = 1.0 / math.sqrt(queries.size(-1))
        position_queries = (queries + self.pos_bias_v.unsqueeze(1)) * scale
        bias = shift_distances(position_queries @ distances.transpose(-2, -1))  # (B, H, T, T)
        if real.mask is not None:
            bias = bias.masked_fill(~real.mask[:, None, None, :], -math.inf)
        context = F.scaled_dot_product_attention(
            queries + self.pos_bias_u.unsqueeze(1), keys, values, attn_mask=bias, scale=scale
        )
        # (B, H, T, D/H) -> (N, D)
        return self.linear_out(real.pack(context.transpose(1, 2)).flatten(1))


def shift_distances(scores: Tensor) -> Tensor:
    """Turns scores by distance into scores by key, without a copy.

    Row i holds distances T - 1 down to -(T - 1). Key j of query i lies at distance i - j, which
    is column T - 1 - i + j of 2T - 1, or place (T - 1) + i·(2T - 2) + j of the whole: from place
    T - 1 on, read in rows of 2T - 2, every row begins with its T scores.

    Args:
        scores: (B, H, T, 2T - 1).

    Returns:
        (B, H, T, T).
    """
    length = scores.size(-2)
    if length == 1:
        return scores
    rows = scores.flatten(-2)[..., length - 1 : -1]  # (B, H, T·(2T-2))
    return rows.unflatten(-1, (length, -1))[..., :length]
