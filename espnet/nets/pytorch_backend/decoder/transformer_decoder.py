"""Transformer decoder: teacher-forced for training, cached and batched over beams for search."""

import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.nets_utils import padding_mask
from espnet.nets.pytorch_backend.transformer.attention import MultiHeadedAttention
from espnet.nets.pytorch_backend.transformer.embedding import PositionalEncoding
from espnet.nets.pytorch_backend.transformer.positionwise_feed_forward import (
    PositionwiseFeedForward,
)
from espnet.nets.scorer_interface import ScorerInterface

LAYER_NORM_EPS = 1e-12  # that of published checkpoints


@dataclass(frozen=True)
class DecoderState:
    """What the search carries from step to step; L layers, K hypotheses for each utterance.

    Attributes:
        beam_size: K.
        memory: For each layer the keys and values of the memory, (B, H, T, D/H): one copy an
            utterance, whatever the beam.
        memory_mask: Real frames, (B, 1, 1, T), or None if all are real.
        cache: Self-attention keys and values of all layers, (L, 2, B·K, H, U, D/H).
    """

    beam_size: int
    memory: list[tuple[Tensor, Tensor]]
    memory_mask: Tensor | None
    cache: Tensor


class DecoderLayer(nn.Module):
    """Self-attention, attention to the memory, feed-forward, each behind a layer norm.

    Args:
        dim: Feature size D.
        heads: Attention heads.
        hidden_units: Units of the feed-forward block.
        dropout_rate: Dropout on each residual branch.
    """

    def __init__(self, *, dim: int, heads: int, hidden_units: int, dropout_rate: float) -> None:
        super().__init__()
        self.self_attn = MultiHeadedAttention(heads=heads, dim=dim)
        self.src_attn = MultiHeadedAttention(heads=heads, dim=dim)
        self.feed_forward = PositionwiseFeedForward(
            dim=dim, hidden_units=hidden_units, dropout_rate=dropout_rate
        )
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        """Applies the block to whole token sequences; a token sees none that follow it.

        Args:
            x: Token features, (B, U, D).
            memory: Encoder output, (B, T, D).
            memory_mask: Real frames, (B, 1, 1, T), or None if all are real.

        Returns:
            Token features, (B, U, D).
        """
        normed = self.norm1(x)
        x = x + self.dropout(self.self_attn(normed, normed, is_causal=True))
        x = x + self.dropout(self.src_attn(self.norm2(x), memory, memory_mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))

    def step(
        self,
        x: Tensor,
        cache: Tensor,
        memory: tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
        beam_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Applies the block to the last token of every hypothesis.

        Args:
            x: Features of the last tokens, (B·K, 1, D).
            cache: Keys and values of the tokens before, (2, B·K, H, U, D/H).
            memory: Keys and values of the memory, each (B, H, T, D/H).
            memory_mask: Real frames, (B, 1, 1, T), or None if all are real.
            beam_size: K.

        Returns:
            Features, (B·K, 1, D), and the cache with this token, (2, B·K, H, U + 1, D/H).
        """
        normed = self.norm1(x)
        cache = torch.cat([cache, torch.stack(self.self_attn.project_memory(normed))], dim=3)
        x = x + self.self_attn.attend(normed, *cache)
        # The hypotheses of an utterance attend to its one memory as a sequence of K queries.
        queries = self.norm2(x).view(-1, beam_size, x.size(-1))  # (B·K, 1, D) -> (B, K, D)
        x = x + self.src_attn.attend(queries, *memory, memory_mask).view_as(x)
        return x + self.feed_forward(self.norm3(x)), cache


class TransformerDecoder(nn.Module, ScorerInterface):
    """Autoregressive decoder over the encoder's output.

    Source: Vaswani et al., Attention Is All You Need, 2017, with layer norm before each block.

    Args:
        odim: Vocabulary size V.
        attention_dim: Feature size D, that of the memory too.
        attention_heads: Attention heads H.
        linear_units: Units of the feed-forward blocks.
        num_blocks: Number of blocks L.
        dropout_rate: Dropout on positions and residual branches.
    """

    first_token = 0  # id of the output layer's first column

    def __init__(
        self,
        *,
        odim: int,
        attention_dim: int = 768,
        attention_heads: int = 12,
        linear_units: int = 3072,
        num_blocks: int = 6,
        dropout_rate: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Embedding(odim, attention_dim),
            PositionalEncoding(dim=attention_dim, dropout_rate=dropout_rate),
        )
        self.decoders = nn.ModuleList(
            DecoderLayer(
                dim=attention_dim,
                heads=attention_heads,
                hidden_units=linear_units,
                dropout_rate=dropout_rate,
            )
            for _ in range(num_blocks)
        )
        self.after_norm = nn.LayerNorm(attention_dim, eps=LAYER_NORM_EPS)
        self.output_layer = nn.Linear(attention_dim, odim)

    def forward(self, tokens: Tensor, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        """Scores every next token of given sequences.

        Args:
            tokens: Token ids that begin with sos, (B, U).
            memory: Encoder output, (B, T, D).
            memory_lengths: Real frames, (B,).

        Returns:
            Unnormalised scores of the tokens that follow, (B, U, V).
        """
        return self.logits(self.features(tokens, memory, memory_lengths))

    def features(self, tokens: Tensor, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        """What `logits` scores the next tokens by, (B, U, D); arguments as for `forward`."""
        memory_mask = _attention_mask(memory_lengths, memory.size(1))
        x = self.embed(tokens)
        for layer in self.decoders:
            x = layer(x, memory, memory_mask)
        return self.after_norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Unnormalised scores of the vocabulary, (..., D) -> (..., V)."""
        return self.output_layer(features)

    def max_tokens(self, frames: int) -> int:  # noqa: ARG002
        """Most tokens of a text after a memory of so many frames: there is no limit."""
        return sys.maxsize

    def init(self, memory: Tensor, memory_lengths: Tensor, beam_size: int) -> DecoderState:
        """Projects the memory once; the cache of tokens is empty. See `ScorerInterface`."""
        projections = [layer.src_attn.project_memory(memory) for layer in self.decoders]
        batch, heads, _, head_dim = projections[0][0].shape
        cache = projections[0][0].new_empty(
            len(projections), 2, batch * beam_size, heads, 0, head_dim
        )
        return DecoderState(
            beam_size=beam_size,
            memory=projections,
            memory_mask=_attention_mask(memory_lengths, memory.size(1)),
            cache=cache,
        )

    def score(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Log-probabilities of the tokens that follow, (B·K, V). See `ScorerInterface`."""
        embedding, positions = self.embed
        x = positions(embedding(tokens.unsqueeze(1)), offset=state.cache.size(4))
        caches = []
        for layer, cache, memory in zip(self.decoders, state.cache, state.memory, strict=True):
            x, cache = layer.step(x, cache, memory, state.memory_mask, state.beam_size)
            caches.append(cache)
        logits = self.logits(self.after_norm(x.squeeze(1)))
        return F.log_softmax(logits.float(), dim=-1), replace(state, cache=torch.stack(caches))

    def reorder(self, state: DecoderState, index: Tensor) -> DecoderState:
        """Keeps the hypotheses of `index`. See `ScorerInterface`."""
        cache = state.cache.index_select(2, index)
        if len(index) == state.cache.size(2):
            return replace(state, cache=cache)
        kept = index[:: state.beam_size] // state.beam_size
        return replace(
            state,
            cache=cache,
            memory=[(keys[kept], values[kept]) for keys, values in state.memory],
            memory_mask=None if state.memory_mask is None else state.memory_mask[kept],
        )


def _attention_mask(lengths: Tensor, max_length: int) -> Tensor | None:
    """Real frames in the shape that attention takes, (B, 1, 1, T), or None if all are real."""
    mask = padding_mask(lengths, max_length)
    return None if mask is None else mask[:, None, None, :]
