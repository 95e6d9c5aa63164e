"""Work on the real frames of a padded batch only: Transformer layers that see them as one row."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from espnet.nets.pytorch_backend.nets_utils import length_groups

MAX_PADDING = 0.3  # largest share of an utterance in a block of attention that is padding


@dataclass(frozen=True)
class Packing:
    """Where the N real frames of a padded batch are.

    What treats each frame by itself takes them packed, one utterance after the other: (1, N, D).
    Attention takes them padded, in blocks of utterances of similar length: its work grows with
    the square of the length, but many small blocks would be slow too.

    Attributes:
        mask: Real frames, (B, T).
        real: Their places among the B·T of the batch, (N,).
        blocks: What each block has of the utterances, in their order; a block has none itself.
    """

    mask: Tensor
    real: Tensor
    blocks: "tuple[Packing, ...]" = ()

    @classmethod
    def of(cls, lengths: Tensor) -> "Packing | None":
        """Packs utterances of given lengths, (B,), longest first; None if they are all alike."""
        numbers = lengths.tolist()
        if numbers[-1] == numbers[0]:
            return None
        places = torch.arange(numbers[0], device=lengths.device)
        mask = places < lengths.unsqueeze(1)
        blocks = []
        for rows in length_groups(numbers, max_padding=MAX_PADDING):
            part = mask[rows[0] : rows[-1] + 1, : numbers[rows[0]]]
            blocks.append(cls(part, _true(part)))
        return cls(mask, _true(mask), tuple(blocks))


def _true(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)  # Indexing by number is faster than by mask.


def pack(x: Tensor, packing: Packing | None) -> Tensor:
    """Leaves out the padding: (B, T, ...) -> (1, N, ...); nothing is changed for None."""
    return x if packing is None else x.flatten(0, 1).index_select(0, packing.real)[None]


def pad(x: Tensor, packing: Packing | None) -> Tensor:
    """Puts packed frames among zeros: (1, N, ...) -> (B, T, ...); nothing is changed for None."""
    if packing is None:
        return x
    padded = x.new_zeros(packing.mask.numel(), *x.shape[2:])
    return padded.index_copy_(0, packing.real, x[0]).unflatten(0, packing.mask.shape)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing | None,
    *,
    gates: Tensor | None = None,
    position_bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Self-attention within each utterance.

    Args:
        query: (1, N, H, D/H) packed, or (B, T, H, D/H).
        key: Likewise.
        value: Likewise.
        packing: Of the frames; None for (B, T, H, D/H) without padding.
        gates: Factors of the bias, (1, N, H, 1) or (B, T, H, 1), if there is one.
        position_bias: What is added to scores by the positions of query and key, (H, T, T).
        dropout: Probability that a weight is dropped.
        scale: Factor of the scores; None: one over the root of D/H.

    Returns:
        Attended values, shaped as `query`.
    """
    inputs = [query, key, value] if gates is None else [query, key, value, gates]
    blocks: tuple[Packing | None, ...] = (None,)
    sizes = [query.size(1)]
    if packing is not None:
        blocks = packing.blocks
        sizes = [len(block.real) for block in blocks]
    attended = []
    for block, *part in zip(blocks, *(x.split(sizes, dim=1) for x in inputs), strict=True):
        # (B, T, H, X) -> (B, H, T, X)
        query, key, value, *gates = (pad(x, block).transpose(1, 2) for x in part)
        mask = None if block is None else block.mask[:, None, None]  # (B, T) -> (B, 1, 1, T)
        if gates:
            mask = _gated(gates[0], position_bias, mask).to(query.dtype)
        values = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
        attended.append(pack(values.transpose(1, 2), block))
    return torch.cat(attended, dim=1)


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
    attention_mask: Packing | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attend` in the form that transformers calls: heads before frames, a packing as the mask."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(query, key, value, attention_mask, dropout=dropout, scale=scaling), None


ATTENTION = "packed"
AttentionInterface.register(ATTENTION, attend_for_transformers)
