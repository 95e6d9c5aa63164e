"""The layers of a causal language model, with blocks between them and keys that a beam shares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from espnet.nets.pytorch_backend.pretrained import cache_argument


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of what precedes the text: one copy an utterance, whatever the beam.

    Attributes:
        cache: For each layer keys and values, (B, H', P, D/H): H' of the H heads have their own.
        mask: Real positions, (B, 1, 1, P), or None if all are real.
        distances: Positions from each to sos, (B, 1, 1, P).
    """

    cache: DynamicCache
    mask: Tensor | None
    distances: Tensor

    def keep(self, utterances: Tensor) -> "SharedPrefix":
        """Leaves out all utterances but those of given numbers, (B',); the cache is changed."""
        self.cache.batch_select_indices(utterances)
        mask = None if self.mask is None else self.mask[utterances]
        return SharedPrefix(self.cache, mask, self.distances[utterances])

    def visible(self, tokens: int, window: int | None) -> Tensor | None:
        """What the last of so many tokens from sos on attends to.

        Args:
            tokens: Number of the tokens, at least 1.
            window: Positions that it sees at most, its own among them; None for all.

        Returns:
            Mask, (B, 1, 1, P), or None if it sees all.
        """
        if window is None or self.distances.size(-1) + tokens <= window:
            return self.mask
        near = self.distances + tokens <= window
        return near if self.mask is None else near & self.mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    shared_prefix: SharedPrefix | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of the layers, in the form that transformers calls.

    With a shared prefix, each of N = B·K hypotheses gives one query. All queries of an utterance,
    over hypotheses and over the H/H' heads that share keys, are one matrix against its prefix, so
    that nothing of the prefix is copied; one softmax spans prefix and own tokens.

    Args:
        module: Attention layer.
        query: (N, H, U, D/H), the last of the positions that have keys; U is 1 with a shared
            prefix.
        key: Keys of the hypotheses' own tokens, (N, H', U', D/H).
        value: Likewise.
        attention_mask: What is seen, as `scaled_dot_product_attention` takes it; None for what
            went before, as far as the window reaches.
        scaling: Factor of the products of queries and keys.
        sliding_window: Positions that a query sees at most, its own among them; None for all.
        softcap: Size that the scores do not exceed; None for any.
        dropout: Probability with which a weight becomes zero.
        shared_prefix: What all hypotheses of an utterance attend to besides.
        **options: Passed on to transformers' attention.

    Returns:
        Attended values, (N, U, H, D/H), and None in place of weights.
    """
    if shared_prefix is not None:
        attended = _attend_with_prefix(
            module.layer_idx, scaling * query, key, value, shared_prefix, sliding_window, softcap
        )
        return attended, None
    beyond = sliding_window is not None and key.size(2) > sliding_window
    if attention_mask is None and (beyond or softcap is not None):
        attention_mask = _window(query.size(2), key.size(2), sliding_window, query.device)
    if softcap is None:
        options |= {"scaling": scaling, "dropout": dropout}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query = scaling * query.unflatten(1, (key.size(1), -1))  # (N, H, U, D/H) -> (N, H', G, U, D/H)
    scores = soft_capped(query @ key.unsqueeze(2).transpose(-2, -1), softcap)
    scores = scores.masked_fill(~attention_mask.unsqueeze(2), -torch.inf)
    weights = F.dropout(torch.softmax(scores.float(), dim=-1), dropout).to(value.dtype)
    attended = weights @ value.unsqueeze(2)
    return attended.flatten(1, 2).transpose(1, 2), None  # (N, H', G, U, D/H) -> (N, U, H, D/H)


def _attend_with_prefix(
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_prefix: SharedPrefix,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """What `attend` does with a shared prefix; the query is scaled."""
    layer = shared_prefix.cache.layers[layer_idx]
    visible = shared_prefix.visible(key.size(2), window)
    if window is not None:
        key, value = key[:, :, -window:], value[:, :, -window:]
    utterances, beam_size = len(layer.keys), len(query) // len(layer.keys)
    query = query.unflatten(1, (key.size(1), -1)).squeeze(3)  # (N, H', G, D/H)

    def by_utterance(x: Tensor) -> Tensor:  # (N, H', G, X) -> (B, H', K·G, X)
        return x.unflatten(0, (utterances, beam_size)).transpose(1, 2).flatten(2, 3)

    def by_hypothesis(x: Tensor) -> Tensor:  # (B, H', K·G, X) -> (N, H', G, X)
        return x.unflatten(2, (beam_size, -1)).transpose(1, 2).flatten(0, 1)

    to_prefix = soft_capped(by_utterance(query) @ layer.keys.transpose(-2, -1), softcap)
    if visible is not None:
        to_prefix = to_prefix.masked_fill(~visible, -torch.inf)
    to_own = soft_capped(query @ key.transpose(-2, -1), softcap)
    scores = torch.cat([by_hypothesis(to_prefix), to_own], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1).to(value.dtype)
    to_prefix, to_own = weights.split([layer.keys.size(2), key.size(2)], dim=-1)
    attended = by_hypothesis(by_utterance(to_prefix) @ layer.values) + to_own @ value
    return attended.flatten(1, 2).unsqueeze(1)  # (N, H', G, D/H) -> (N, 1, H, D/H)


def _window(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Keys that the last positions see, (1, 1, U, U'): none later, none beyond the window."""
    places = torch.arange(keys, device=device)
    ages = places[keys - queries :].unsqueeze(1) - places
    return ((ages >= 0) & (ages < (keys if window is None else window)))[None, None]


def soft_capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores whose size stays below a cap, as in Gemma 2."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


ATTENTION = "shared_prefix"
AttentionInterface.register(ATTENTION, attend)


def run_layers(
    model: PreTrainedModel,
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
        model: A causal language model without its output layer, loaded with `ATTENTION`.
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
    rotary = _rotary(model, hidden, places)

    def apply(index: int, x: Tensor) -> Tensor:
        return model.layers[index](
            blocks[index](x) if index in blocks else x,
            position_embeddings=rotary[index],
            shared_prefix=shared_prefix,
            **{cache_argument(type(model.layers[index])): cache},
        )

    for index in range(len(model.layers)):
        if compute_again:
            hidden = checkpoint(apply, index, hidden, use_reentrant=False)
        else:
            hidden = apply(index, hidden)
    return model.norm(hidden)


def _rotary(model: PreTrainedModel, hidden: Tensor, places: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines of the positions for each layer; those of Gemma 3 differ by its type."""
    if not _differs_by_type(type(model.rotary_emb)):
        return [model.rotary_emb(hidden, places)] * len(model.layers)
    types = model.config.layer_types
    by_type = {layer_type: model.rotary_emb(hidden, places, layer_type) for layer_type in {*types}}
    return [by_type[layer_type] for layer_type in types]


@lru_cache
def _differs_by_type(rotary: type[nn.Module]) -> bool:
    return "layer_type" in signature(rotary.forward).parameters
