"""The decoder of Whisper over the encoder's output, and over video through gated attention."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, WhisperForCausalLM

from espnet.nets.decoders import DECODERS
from espnet.nets.pytorch_backend.decoder.gated_cross_attention import GatedCrossAttention
from espnet.nets.pytorch_backend.decoder.interface import DecoderInterface, leave_out_finished
from espnet.nets.pytorch_backend.encoded import Video
from espnet.nets.pytorch_backend.pretrained import cache_argument, load_pretrained
from espnet.nets.pytorch_backend.real_frames import RealFrames


@dataclass(frozen=True)
class WhisperState:
    """What the search carries from step to step; K hypotheses for each utterance.

    Attributes:
        beam_size: K.
        memory: For each layer the keys and values of the memory, (B, H, T, D/H): one copy an
            utterance, whatever the beam.
        memory_mask: Real frames of it, (B, T), or None if all are real.
        video: For each layer keys and values of the video; empty without video.
        video_mask: Real frames of it, (B, T'), or None if all are real.
        cache: Self-attention keys and values of the prompt and the tokens, of B·K rows; changed
            in place.
    """

    beam_size: int
    memory: list[tuple[Tensor, Tensor]]
    memory_mask: Tensor | None
    video: list[tuple[Tensor, Tensor]]
    video_mask: Tensor | None
    cache: DynamicCache


class WhisperDecoder(DecoderInterface):
    """Decoder of a Whisper checkpoint with its own vocabulary and output layer.

    The project's ids are those of the checkpoint's tokenizer plus 1; 0 is the CTC blank.

    Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, 2023, in
    transformers' implementation; unlike there, padded memory is masked. The gated attention to
    video before each block is that of Rouditchenko et al., Whisper-Flamingo, 2024.

    In search, the tokens that the checkpoint's generation config suppresses are out of the
    question, and so are those of `suppress`; the end symbol only as the first token.

    Args:
        name: Hub id, or a folder as `save_pretrained` leaves it, of a whole Whisper.
        memory_dim: Feature size of the memory, M. A linear layer maps it to that of the
            checkpoint, D, if they differ.
        prompt: The tokenizer's ids that precede a text, such as <|startoftranscript|>, <|en|>,
            <|transcribe|>, <|notimestamps|>; the last one is the start symbol.
        eos: Id of the end symbol, in the project's ids.
        freeze: Whether the checkpoint's weights stay as they are.
        gradient_checkpointing: Whether training computes the blocks again for their gradients;
            they flow through frozen blocks too, to the encoder.
        suppress: The tokenizer's ids that no text holds, such as its special tokens.
        video_dim: Features of the video beside the memory, V; 0 for no video.
        dropout_rate: Dropout of the gated attention to video.
        dtype: Precision of the checkpoint's weights.
        quantize: Whether its linear layers go into 4 bits while they are loaded.

    Raises:
        ValueError: If the checkpoint cannot be loaded, the prompt or `eos` is not in its
            vocabulary, or the prompt leaves no position for a text.
    """

    first_token = 1

    def __init__(
        self,
        name: str,
        *,
        memory_dim: int,
        prompt: tuple[int, ...],
        eos: int,
        freeze: bool = True,
        gradient_checkpointing: bool = True,
        suppress: tuple[int, ...] = (),
        video_dim: int = 0,
        dropout_rate: float = 0.1,
        dtype: torch.dtype = torch.float32,
        quantize: bool = False,
    ) -> None:
        super().__init__()
        backbone = load_pretrained(
            WhisperForCausalLM,
            name,
            DECODERS["whisper"].model_types,
            flag="--decoder-name",
            attn_implementation="sdpa",  # which takes masks that are not added, but say True
            dtype=dtype,
            quantize=quantize,
        )
        config = backbone.config
        _check_prompt(name, prompt, eos, config.vocab_size, config.max_target_positions)
        self.backbone = backbone
        self.gradient_checkpointing = gradient_checkpointing
        self.positions = config.max_target_positions
        self.prompt = tuple(prompt)
        prefix = torch.tensor(prompt[:-1], dtype=torch.int64)
        self.register_buffer("prefix", prefix, persistent=False)
        self.eos = eos
        self.odim = self.first_token + config.vocab_size
        self.memory_projection = (
            nn.Identity() if memory_dim == config.d_model else nn.Linear(memory_dim, config.d_model)
        )
        self.video_attention = nn.ModuleList(
            GatedCrossAttention(
                config.d_model, video_dim, config.decoder_attention_heads, dropout_rate
            )
            for _ in range(config.decoder_layers if video_dim else 0)
        )
        self._suppress(suppress)
        if freeze:
            backbone.requires_grad_(False)

    def max_tokens(self, frames: int) -> int:  # noqa: ARG002
        """Most tokens of a text, without start and end symbol, whatever the frames of memory."""
        return self.positions - len(self.prompt)

    def features(
        self,
        tokens: Tensor,
        memory: Tensor,
        memory_lengths: Tensor,
        video: Video | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, U, D). See `DecoderInterface`."""
        longest = self.max_tokens(memory.size(1))
        if tokens.size(1) - 1 > longest:
            raise ValueError(
                f"a text has {tokens.size(1) - 1} tokens, but the Whisper decoder takes at most "
                f"{longest} after its prompt: leave the utterance out, or shorten its text"
            )
        mask = RealFrames.of(memory_lengths, memory).mask
        frames = None if video is None else video.features
        attended = (self._project(memory), mask, frames, _mask_of(video))
        prefix = self._prefix(tokens)
        x = self._embed(torch.cat([prefix, tokens - self.first_token], dim=1), offset=0)
        # Transformers' own checkpointing leaves frozen layers out, which are in eval mode.
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self._blocks():
            if again:
                x = checkpoint(_apply_block, *block, x, *attended, use_reentrant=False)
            else:
                x = _apply_block(*block, x, *attended)
        return self.backbone.model.decoder.layer_norm(x[:, prefix.size(1) :])

    def logits(self, features: Tensor) -> Tensor:
        """Scores by the checkpoint's output layer; nothing is suppressed."""
        return self.backbone.proj_out(features)

    def init(
        self,
        memory: Tensor,
        memory_lengths: Tensor,
        beam_size: int,
        video: Video | None = None,
    ) -> WhisperState:
        """Projects the memory and reads the prompt, once an utterance. See `ScorerInterface`."""
        projected = self._project(memory)
        attentions = [layer.encoder_attn for layer, _ in self._blocks()]
        state = WhisperState(
            beam_size=1,
            memory=[_keys_and_values(attention, projected) for attention in attentions],
            memory_mask=RealFrames.of(memory_lengths, memory).mask,
            video=[gated.project_memory(video.features) for gated in self.video_attention],
            video_mask=_mask_of(video),
            cache=DynamicCache(),
        )
        prefix = self._prefix(memory)
        if prefix.size(1):
            self._advance(prefix, state)
        state.cache.batch_repeat_interleave(beam_size)
        return replace(state, beam_size=beam_size)

    def score(self, tokens: Tensor, state: WhisperState) -> tuple[Tensor, WhisperState]:
        """Log-probabilities of the tokens that follow, (B·K, odim). See `ScorerInterface`.

        A hypothesis that fills all positions can only end.
        """
        position = state.cache.get_seq_length()
        if position >= self.positions:  # None is left that could go on: they are over.
            scores = torch.zeros(len(tokens), self.odim, device=tokens.device)
            return scores.masked_fill(self.all_but_eos, -torch.inf), state
        # Hypotheses that are over may hold blanks, which have no embedding.
        ids = (tokens.unsqueeze(1) - self.first_token).clamp(min=0)
        features = self._advance(ids, state)
        # As in `generate`, what is suppressed keeps its share of the probability.
        scores = F.log_softmax(self.logits(features).squeeze(1).float(), dim=-1)
        first = position == len(self.prompt) - 1
        suppressed = self.suppressed_at_first if first else self.suppressed
        scores = F.pad(scores, (self.first_token, 0)).masked_fill(suppressed, -torch.inf)
        if position == self.positions - 1:
            scores = scores.masked_fill(self.all_but_eos, -torch.inf)
        return scores, state

    def reorder(self, state: WhisperState, index: Tensor) -> WhisperState:
        """Keeps the hypotheses of `index`. See `ScorerInterface`."""
        state.cache.reorder_cache(index)
        return leave_out_finished(state, index, "memory", "memory_mask", "video", "video_mask")

    def _advance(self, ids: Tensor, state: WhisperState) -> Tensor:
        """Reads tokens, which enter the cache.

        Args:
            ids: The tokenizer's ids, (B·K, U); U is 1 unless the cache is empty.
            state: Of what precedes them.

        Returns:
            What the output layer takes, (B·K, U, D).
        """
        beam_size, mask = state.beam_size, state.memory_mask
        attended = None if mask is None else mask[:, None, None]  # (B, T) -> (B, 1, 1, T)
        x = self._embed(ids, offset=state.cache.get_seq_length())
        for index, (layer, gated) in enumerate(self._blocks()):
            if gated is not None:
                x = gated.attend(x, *state.video[index], state.video_mask, beam_size)
            normed = layer.self_attn_layer_norm(x)
            cached = {cache_argument(type(layer.self_attn)): state.cache}
            x = x + layer.self_attn(normed, **cached)[0]
            # The hypotheses of an utterance attend to its one memory as a sequence of queries.
            queries = layer.encoder_attn_layer_norm(x).unflatten(0, (-1, beam_size)).flatten(1, 2)
            x = x + _attend(layer.encoder_attn, queries, *state.memory[index], attended).view_as(x)
            normed = layer.final_layer_norm(x)
            x = x + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return self.backbone.model.decoder.layer_norm(x)

    def _blocks(self) -> Iterator[tuple[nn.Module, GatedCrossAttention | None]]:
        """The checkpoint's layers, each with the attention to video that precedes it."""
        return zip_longest(self.backbone.model.decoder.layers, self.video_attention)

    def _embed(self, ids: Tensor, offset: int) -> Tensor:
        """Embeds the tokenizer's ids (B, U), of which the first is at position `offset`."""
        decoder = self.backbone.model.decoder
        positions = decoder.embed_positions.weight[offset : offset + ids.size(1)]
        x = decoder.embed_tokens(ids) + positions
        return F.dropout(x, decoder.dropout, decoder.training)

    def _prefix(self, batch: Tensor) -> Tensor:
        """The prompt before sos for each row of a batch, (B, P - 1)."""
        return self.prefix.expand(len(batch), -1)

    def _project(self, memory: Tensor) -> Tensor:
        """The memory in the checkpoint's size and precision, (B, T, M) -> (B, T, D)."""
        memory = self.memory_projection(memory)
        half = self.backbone.dtype != torch.float32
        return memory.to(self.backbone.dtype) if half else memory

    def _suppress(self, suppress: tuple[int, ...]) -> None:
        """Marks the ids (odim,) that search leaves out: always, as first token, at the end."""
        config = self.backbone.generation_config
        always = self._mark([*suppress, *(config.suppress_tokens or ())])
        first = always | self._mark(config.begin_suppress_tokens or ())
        if self.eos - self.first_token in (config.begin_suppress_tokens or ()):
            first[self.eos] = True  # As in `generate`, a text is never empty.
        all_but_eos = torch.ones(self.odim, dtype=torch.bool)
        all_but_eos[self.eos] = False
        self.register_buffer("suppressed", always, persistent=False)
        self.register_buffer("suppressed_at_first", first, persistent=False)
        self.register_buffer("all_but_eos", all_but_eos, persistent=False)

    def _mark(self, ids: Iterable[int]) -> Tensor:
        """Marks the blank and the tokenizer's ids, but not eos; (odim,)."""
        marked = torch.zeros(self.odim, dtype=torch.bool)
        known = [i + self.first_token for i in ids if 0 <= i < self.odim - self.first_token]
        marked[[0, *known]] = True
        marked[self.eos] = False
        return marked


def _check_prompt(
    name: str, prompt: tuple[int, ...], eos: int, vocab_size: int, positions: int
) -> None:
    """Raises a ValueError if a checkpoint does not know the prompt or eos, or has no room."""
    remedy = "take the tokenizer of the same checkpoint"
    if not prompt or not all(0 <= token < vocab_size for token in prompt):
        raise ValueError(
            f"prompt {prompt}: --decoder-name {name} expects at least one id, of 0 to "
            f"{vocab_size - 1}: {remedy}"
        )
    if not 1 <= eos <= vocab_size:
        raise ValueError(
            f"eos {eos}: --decoder-name {name} expects an id of 1 to {vocab_size}: {remedy}"
        )
    if len(prompt) >= positions:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens leaves no room for a text: --decoder-name {name} "
            f"has {positions} positions: shorten the prompt"
        )


def _apply_block(
    layer: nn.Module,
    gated: GatedCrossAttention | None,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    video: Tensor | None,
    video_mask: Tensor | None,
) -> Tensor:
    """Applies one of `_blocks` to whole sequences; a token sees none that follow it.

    Args:
        layer: Layer of the checkpoint.
        gated: Attention to the video, if there is any.
        x: Token features, (B, U, D).
        memory: In the checkpoint's size, (B, T, D).
        mask: Real frames of it, (B, T), or None if all are real.
        video: Features of the video, (B, T', V), if there is any.
        video_mask: Real frames of it, (B, T'), or None if all are real.

    Returns:
        Token features, (B, U, D).
    """
    if gated is not None:
        x = gated(x, video, video_mask)
    attended = None if mask is None else mask[:, None, None]  # (B, T) -> (B, 1, 1, T)
    return layer(x, None, memory, attended, use_cache=False)  # None: causal, without padding


def _mask_of(video: Video | None) -> Tensor | None:
    """Real frames, (B, T'), or None if all are real, or there is no video."""
    return None if video is None else RealFrames.of(video.lengths, video.features).mask


def _heads(attention: nn.Module, x: Tensor) -> Tensor:
    """(B, T, D) -> (B, H, T, D/H)."""
    return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def _keys_and_values(attention: nn.Module, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a memory (B, T, D), each (B, H, T, D/H)."""
    return (
        _heads(attention, attention.k_proj(memory)),
        _heads(attention, attention.v_proj(memory)),
    )


def _attend(
    attention: nn.Module, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> Tensor:
    """Whisper's cross-attention to a memory that is already projected.

    Args:
        attention: The layer's attention to the memory.
        x: Features, (B, Q, D).
        keys: Keys, (B, H, T, D/H).
        values: Values, (B, H, T, D/H).
        mask: Real frames, (B, 1, 1, T), or None if all are real.

    Returns:
        Features, (B, Q, D).
    """
    queries = _heads(attention, attention.q_proj(x))
    context = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    return attention.out_proj(context.transpose(1, 2).flatten(2))  # (B, H, Q, D/H) -> (B, Q, D)
