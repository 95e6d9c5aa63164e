"""Transformer decoder: teacher-forced for training, cached and batched over beams for search."""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.decoder.interface import DecoderInterface, leave_out_finished
from espnet.nets.pytorch_backend.decoder.token_cache import TokenCache
from espnet.nets.pytorch_backend.real_frames import RealFrames
from espnet.nets.pytorch_backend.transformer.attention import MultiHeadedAttention
from espnet.nets.pytorch_backend.transformer.embedding import PositionalEncoding
from espnet.nets.pytorch_backend.transformer.positionwise_feed_forward import (
    PositionwiseFeedForward,
)

LAYER_NORM_EPS = 1e-12  # that of published checkpoints


@dataclass(frozen=True)
class DecoderState:
    """What the search carries from step to step; L layers, K hypotheses for each utterance.

    Attributes:
        beam_size: K.
        memory: For each layer the keys and values of the memory, (B, H, T, D/H): one copy an
            utterance, whatever the beam.
        memory_mask: Real frames, (B, 1, 1, T), or None if all are real.
        cache: Self-attention keys and values of the tokens so far; steps change it.
    """

    beam_size: int
    memory: list[tuple[Tensor, Tensor]]
    memory_mask: Tensor | None
    cache: TokenCache


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
        number: int,
        cache: TokenCache,
        memory: tuple[Tensor, Tensor],
        memory_mask: Tensor | None,
        beam_size: int,
    ) -> Tensor:
        """Applies the block to the last token of every hypothesis.

        Args:
            x: Features of the last tokens, (B·K, 1, D).
            number: Number of the block.
            cache: Keys and values of the tokens before; those of the last ones are written to it.
            memory: Keys and values of the memory, each (B, H, T, D/H).
            memory_mask: Real frames, (B, 1, 1, T), or None if all are real.
            beam_size: K.

        Returns:
            Features, (B·K, 1, D).
        """
        normed = self.norm1(x)
        cache.write(number, self.self_attn.linear_k(normed), self.self_attn.linear_v(normed))
        x = x + self.self_attn.attend_by_pieces(normed, cache.read(number))
        # The hypotheses of an utterance attend to its one memory as a sequence of K queries.
        queries = self.norm2(x).view(-1, beam_size, x.size(-1))  # (B·K, 1, D) -> (B, K, D)
        x = x + self.src_attn.attend(queries, *memory, memory_mask).view_as(x)
        return x + self.feed_forward(self.norm3(x))


class TransformerDecoder(DecoderInterface):
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

    first_token = 0

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
        self.odim = odim
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

    def features(self, tokens: Tensor, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        """Features after the last block's norm, (B, U, D). See `DecoderInterface`."""
        memory_mask = _attention_mask(memory_lengths, memory)
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
        return DecoderState(
            beam_size=beam_size,
            memory=projections,
            memory_mask=_attention_mask(memory_lengths, memory),
            # Unless told otherwise, a text has as many tokens as frames at most.
            cache=TokenCache(len(projections), projections[0][0].size(1), memory.size(1)),
        )

    @torch.no_grad()
    def score(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Log-probabilities of the tokens that follow, (B·K, V). See `ScorerInterface`."""
        embedding, positions = self.embed
        x = positions(embedding(tokens.unsqueeze(1)), offset=state.cache.length)
        state.cache.begin_step(tokens)
        for number, (layer, memory) in enumerate(zip(self.decoders, state.memory, strict=True)):
            x = layer.step(x, number, state.cache, memory, state.memory_mask, state.beam_size)
        logits = self.logits(self.after_norm(x.squeeze(1)))
        return F.log_softmax(logits, dim=-1, dtype=torch.float32), state

    def reorder(self, state: DecoderState, index: Tensor) -> DecoderState:
        """Keeps the hypotheses of `index`; the cache is changed. See `ScorerInterface`."""
        state.cache.reorder(index)
        return leave_out_finished(state, index, "memory", "memory_mask")


def _attention_mask(lengths: Tensor, memory: Tensor) -> Tensor | None:
    """Real frames in the shape that attention takes, (B, 1, 1, T), or None if all are real."""
    mask = RealFrames.of(lengths, memory).mask
    return None if mask is None else mask[:, None, None, :]
