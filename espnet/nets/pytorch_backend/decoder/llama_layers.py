"""The layers of LLaMA, with other blocks between them, and with keys that a beam shares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, DynamicCache, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from espnet.nets.pytorch_backend.pretrained import cache_argument


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of what precedes the text: one copy an utterance, whatever the beam.

    Attributes:
        cache: For each layer keys and values, (B, H', P, D/H): H' of the H heads have their own.
        mask: Real positions, (B, 1, 1, P), or None if all are real.
    """

    cache: DynamicCache
    mask: Tensor | None

    def keep(self, utterances: Tensor) -> "SharedPrefix":
        """Leaves out all utterances but those of given numbers, (B',); the cache is changed."""
        self.cache.batch_select_indices(utterances)
        return SharedPrefix(self.cache, None if self.mask is None else self.mask[utterances])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    shared_prefix: SharedPrefix | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of LLaMA's layers, in the form that transformers calls.

    With a shared prefix, each of N = B·K hypotheses gives one query. All queries of an utterance,
    over hypotheses and over the H/H' heads that share keys, are one matrix against its prefix, so
    that nothing of the prefix is copied; one softmax spans prefix and own tokens.

    Args:
        module: Attention layer.
        query: (N, H, U, D/H); U is 1 with a shared prefix.
        key: Keys of the hypotheses' own tokens, (N, H', U', D/H).
        value: Likewise.
        attention_mask: As `scaled_dot_product_attention` takes it; None for causal attention.
        scaling: Factor of the products of queries and keys.
        shared_prefix: What all hypotheses of an utterance attend to besides.
        **options: Passed on where there is no shared prefix.

    Returns:
        Attended values, (N, U, H, D/H), and None in place of weights.
    """
    if shared_prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    layer = shared_prefix.cache.layers[module.layer_idx]
    utterances, beam_size = len(layer.keys), len(query) // len(layer.keys)
    query = scaling * query.unflatten(1, (key.size(1), -1)).squeeze(3)  # (N, H', G, D/H)

    def by_utterance(x: Tensor) -> Tensor:  # (N, H', G, X) -> (B, H', K·G, X)
        return x.unflatten(0, (utterances, beam_size)).transpose(1, 2).flatten(2, 3)

    def by_hypothesis(x: Tensor) -> Tensor:  # (B, H', K·G, X) -> (N, H', G, X)
        return x.unflatten(2, (beam_size, -1)).transpose(1, 2).flatten(0, 1)

    to_prefix = by_utterance(query) @ layer.keys.transpose(-2, -1)
    if shared_prefix.mask is not None:
        to_prefix = to_prefix.masked_fill(~shared_prefix.mask, -torch.inf)
    scores = torch.cat([by_hypothesis(to_prefix), query @ key.transpose(-2, -1)], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
    to_prefix, to_own = weights.split([layer.keys.size(2), key.size(2)], dim=-1)
    attended = by_hypothesis(by_utterance(to_prefix) @ layer.values) + to_own @ value
    return attended.flatten(1, 2).unsqueeze(1), None  # (N, H', G, D/H) -> (N, 1, H, D/H)


ATTENTION = "shared_prefix"
AttentionInterface.register(ATTENTION, attend)


def run_layers(
    model: LlamaModel,
    hidden: Tensor,
    places: Tensor,
    blocks: Mapping[int, Callable[[Tensor], Tensor]],
    *,
    cache: DynamicCache | None = None,
    shared_prefix: SharedPrefix | None = None,
    compute_again: bool = False,
) -> Tensor:
    """Applies all layers and the final norm.

    Args:
        model: The model, loaded with `ATTENTION`.
        hidden: Embeddings, (N, S, D), with all padding at the end.
        places: Their positions, (N, S) or (1, S).
        blocks: What the hidden states go through before a layer, by its number.
        cache: Keys and values of the positions before, to which those of these are added.
        shared_prefix: What all hypotheses of an utterance attend to besides; S is then 1.
        compute_again: Whether the gradients, of a call without cache, are to come from computing
            layers again. transformers' own switch leaves out layers in eval mode, which frozen
            ones are, though gradients flow through them too.

    Returns:
        Hidden states, (N, S, D).
    """
    rotary = model.rotary_emb(hidden, places)

    def apply(index: int, x: Tensor) -> Tensor:
        return model.layers[index](
            blocks[index](x) if index in blocks else x,
            position_embeddings=rotary,
            shared_prefix=shared_prefix,
            **{cache_argument(type(model.layers[index])): cache},
        )

    for index in range(len(model.layers)):
        if compute_again:
            hidden = checkpoint(apply, index, hidden, use_reentrant=False)
        else:
            hidden = apply(index, hidden)
    return model.norm(hidden)
