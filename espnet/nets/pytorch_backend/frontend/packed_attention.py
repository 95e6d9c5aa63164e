"""Attention of Transformer layers that see the real frames of a padded batch as one row."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from espnet.nets.pytorch_backend.real_frames import RealFrames


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: RealFrames,
    *,
    gates: Tensor | None = None,
    position_bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Self-attention within each utterance.

    Args:
        query: Packed, (1, N, H, D/H).
        key: Likewise.
        value: Likewise.
        real: Where the frames are, in a batch whose longest utterances come first.
        gates: Factors of the bias, (1, N, H, 1), if there is one.
        position_bias: What is added to scores by the positions of query and key, (H, T, T).
        dropout: Probability that a weight is dropped.
        scale: Factor of the scores; None: one over the root of D/H.

    Returns:
        Attended values, shaped as `query`.
    """
    inputs = [query, key, value] if gates is None else [query, key, value, gates]
    sizes = [block.number for block in real.blocks]
    attended = []
    for block, *part in zip(real.blocks, *(x[0].split(sizes) for x in inputs), strict=True):
        # (N', H, X) -> (B', H, T', X)
        query, key, value, *gates = (block.pad(x).transpose(1, 2) for x in part)
        mask = None if block.mask is None else block.mask[:, None, None]  # -> (B', 1, 1, T')
        if gates:
            mask = _gated(gates[0], position_bias, mask).to(query.dtype)
        values = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
        attended.append(block.pack(values.transpose(1, 2)))
    return torch.cat(attended)[None]


def _gated(gates: Tensor, position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """Bias of a block, (B, H, T, T), minus infinity for keys that are padding."""
    length = gates.size(2)
    bias = gates * position_bias[:, :length, :length]
    return bias if mask is None else bias.masked_fill_(~mask, -torch.inf)


def attend_for_transformers(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: RealFrames,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attend` in the form that transformers calls: heads before frames, `real` as mask."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(query, key, value, attention_mask, dropout=dropout, scale=scaling), None


ATTENTION = "packed"
AttentionInterface.register(ATTENTION, attend_for_transformers)
