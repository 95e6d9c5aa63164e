"""A causal language model as decoder: it attends to, or reads, the encoder's output."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from espnet.nets.decoders import CAUSAL_LM_TYPES, LLAMA_CONDITIONINGS
from espnet.nets.pytorch_backend.decoder.causal_lm_layers import (
    ATTENTION,
    SharedPrefix,
    run_layers,
    soft_capped,
)
from espnet.nets.pytorch_backend.decoder.gated_cross_attention import GatedCrossAttention
from espnet.nets.pytorch_backend.decoder.interface import DecoderInterface, leave_out_finished
from espnet.nets.pytorch_backend.decoder.memory_prefix import MemoryPrefix, join
from espnet.nets.pytorch_backend.decoder.prefix_ctc import PrefixCTC
from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.pytorch_backend.pretrained import load_pretrained
from espnet.nets.pytorch_backend.real_frames import RealFrames


@dataclass(frozen=True)
class CausalLMDecoderState:
    """What the search carries from step to step; K hypotheses for each of B utterances.

    Attributes:
        beam_size: K.
        starts: Position of sos, (B,).
        first_start: The smallest of them, and of those of utterances that are over.
        memory: For each block of cross-attention the keys and values of the memory,
            (B, H, T, D/H): one copy an utterance, whatever the beam.
        memory_mask: Real frames, (B, T), or None if all are real.
        prefix: Keys and values of what precedes sos, one copy an utterance; None if nothing does.
        cache: Keys and values of the text, (B·K, H', U, D/H) in each layer.
    """

    beam_size: int
    starts: Tensor
    first_start: int
    memory: list[tuple[Tensor, Tensor]]
    memory_mask: Tensor | None
    prefix: SharedPrefix | None
    cache: DynamicCache


class CausalLMDecoder(DecoderInterface):
    """Decoder over the encoder's output made of a pretrained language model.

    The model is one of `CAUSAL_LM_TYPES`, in transformers' layers. With `cross-attention`, gated
    blocks before some layers attend to the memory. Their gates are closed at the start: the
    language model is then what it was. With `prefix`, the memory becomes embeddings that stand
    between the first token of the prompt and the rest.

    Source: Alayrac et al., Flamingo, 2022 (gated cross-attention); Cappellazzo et al., Large
    Language Models Are Strong Audio-Visual Speech Recognition Learners, 2025 (prefix). In the
    search, keys and values of what precedes the text are kept once an utterance, not once a
    hypothesis.

    Ids of the project are the tokenizer's plus 1, `prompt` holds the tokenizer's own.

    Args:
        name: Hub id, or a folder as `save_pretrained` leaves it.
        memory_dim: Size of the encoder's output.
        prompt: Tokens that precede the text, first BOS or what stands in for it; the last one is
            the start symbol.
        eos: Id of the end symbol, the project's.
        suppress: The tokenizer's ids that no text holds, such as its special tokens: a search
            never chooses them.
        conditioning: `cross-attention` or `prefix`.
        cross_every: Layers from one block of cross-attention to the next.
        downsample: Frames in an embedding of the prefix.
        prefix_ctc: Whether the prefix has a `PrefixCTC`, for `prefix_loss`.
        freeze: Whether the weights of the checkpoint stay as they are; it then stays in eval mode
            too. What is new is trained in any case.
        gradient_checkpointing: Whether layers are computed again for their gradients.
        dropout_rate: Dropout in the blocks of cross-attention.
        dtype: Precision of the checkpoint's weights.
        quantize: Whether its linear layers go into 4 bits while they are loaded.

    Attributes:
        sos: Id of the start symbol.

    Raises:
        ValueError: If the checkpoint cannot be loaded, is of another type or no model that
            writes, or an option is out of range or does not fit it.
    """

    first_token = 1

    def __init__(
        self,
        name: str,
        *,
        memory_dim: int,
        prompt: tuple[int, ...],
        eos: int,
        suppress: tuple[int, ...] = (),
        conditioning: str = "cross-attention",
        cross_every: int = 4,
        downsample: int = 3,
        prefix_ctc: bool = False,
        freeze: bool = True,
        gradient_checkpointing: bool = True,
        dropout_rate: float = 0.1,
        dtype: torch.dtype = torch.float32,
        quantize: bool = False,
    ) -> None:
        super().__init__()
        _check_options(prompt, conditioning, cross_every, downsample)
        self.backbone = load_pretrained(
            AutoModelForCausalLM,
            name,
            CAUSAL_LM_TYPES,
            flag="--decoder-name",
            attn_implementation=ATTENTION,
            dtype=dtype,
            quantize=quantize,
        )
        config = self.backbone.config
        if getattr(config, "use_bidirectional_attention", False):
            raise ValueError(
                f"--decoder-name {name} is a {config.model_type} that attends in both directions, "
                "one that writes from left to right is expected: give another checkpoint"
            )
        tokens = self.backbone.lm_head.weight.size(0)
        if not all(0 <= token < tokens for token in (*prompt, eos - self.first_token)):
            raise ValueError(
                f"--decoder-name {name} knows {tokens} tokens, but the prompt has "
                f"{', '.join(map(str, prompt))} and the end symbol is {eos - self.first_token}: "
                "take the tokenizer of this checkpoint"
            )
        if freeze:
            self.backbone.requires_grad_(False)
        self.odim = tokens + self.first_token
        self.sos = prompt[-1] + self.first_token
        self.positions = config.max_position_embeddings
        self.gradient_checkpointing = gradient_checkpointing
        self.cross_every = cross_every
        self.register_buffer("prompt", torch.tensor(prompt), persistent=False)
        suppressed = torch.zeros(tokens, dtype=torch.bool)
        suppressed[[token for token in suppress if token < tokens]] = True
        suppressed[eos - self.first_token] = False
        self.register_buffer("suppressed", suppressed, persistent=False)
        self.memory_prefix = None
        self.cross_attention = nn.ModuleList()
        if conditioning == "prefix":
            embed = self.backbone.get_input_embeddings()
            embeddings = embed.weight.detach()
            scale = float(getattr(embed, "embed_scale", 1.0))  # Gemma's grow on their way.
            norm = scale * torch.linalg.vector_norm(embeddings, dtype=torch.float32)
            self.memory_prefix = MemoryPrefix(
                memory_dim=memory_dim,
                dim=config.hidden_size,
                downsample=downsample,
                embedding_rms=float(norm) / embeddings.numel() ** 0.5,
            )
            if prefix_ctc:
                self.prefix_ctc = PrefixCTC(embeddings)
        else:
            self.cross_attention.extend(
                GatedCrossAttention(
                    config.hidden_size, memory_dim, config.num_attention_heads, dropout_rate
                )
                for _ in range(0, config.num_hidden_layers, cross_every)
            )

    def prefix_loss(self, memory: Tensor, memory_lengths: Tensor, targets: Tensor) -> Tensor:
        """CTC loss between the prefix and texts, of a decoder with `prefix_ctc`.

        Args:
            memory: Encoder output, (B, T, memory_dim), padded with anything.
            memory_lengths: Real frames, (B,), on the host.
            targets: Token ids, (B, U), padded with `IGNORE_ID`, on the host.

        Returns:
            Mean over the utterances.
        """
        prefix, lengths = self.memory_prefix(memory, memory_lengths)
        embed = self.backbone.get_input_embeddings()
        return self.prefix_ctc(prefix, lengths, targets, embed, self.first_token)

    def max_tokens(self, frames: int) -> int:
        """Most tokens of a text after a memory of so many frames."""
        prefix = 0
        if self.memory_prefix is not None:
            prefix = -(-frames // self.memory_prefix.downsample)
        return max(0, self.positions - len(self.prompt) - prefix)

    def features(self, tokens: Tensor, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        """Hidden states after the final norm, (B, U, D). See `DecoderInterface`."""
        hidden, starts = self._sequence(tokens, memory, memory_lengths)
        mask = RealFrames.of(memory_lengths, memory).mask
        blocks = [partial(block, memory=memory, memory_mask=mask) for block in self.cross_attention]
        hidden = self._decode(hidden, blocks)
        places = starts.unsqueeze(1) + torch.arange(tokens.size(1))
        places = send(places, hidden.device)
        return hidden.gather(1, places.unsqueeze(2).expand(-1, -1, hidden.size(2)))

    def logits(self, features: Tensor) -> Tensor:
        """Scores of all tokens by the checkpoint's output layer, (..., D) -> (..., V - 1)."""
        softcap = getattr(self.backbone.config, "final_logit_softcapping", None)
        return soft_capped(self.backbone.lm_head(features), softcap)

    def init(self, memory: Tensor, memory_lengths: Tensor, beam_size: int) -> CausalLMDecoderState:
        """Reads all that precedes sos, and projects the memory, once. See `ScorerInterface`."""
        nothing = self.prompt.new_empty(len(memory), 0)
        hidden, starts = self._sequence(nothing, memory, memory_lengths)
        state = CausalLMDecoderState(
            beam_size=1,
            starts=send(starts, memory.device),
            first_start=int(starts.min()),
            memory=[block.project_memory(memory) for block in self.cross_attention],
            memory_mask=RealFrames.of(memory_lengths, memory).mask,
            prefix=None,
            cache=DynamicCache(),
        )
        if not hidden.size(1):
            return replace(state, beam_size=beam_size)
        self._decode(hidden, self._blocks(state), cache=state.cache)
        mask = RealFrames.of(starts, hidden).mask
        distances = state.starts.unsqueeze(1) - torch.arange(hidden.size(1), device=hidden.device)
        prefix = SharedPrefix(
            state.cache,
            None if mask is None else mask[:, None, None],
            distances[:, None, None],
        )
        return replace(state, beam_size=beam_size, prefix=prefix, cache=DynamicCache())

    def score(
        self, tokens: Tensor, state: CausalLMDecoderState
    ) -> tuple[Tensor, CausalLMDecoderState]:
        """Log-probabilities of the tokens that follow, (B·K, V). See `ScorerInterface`.

        Raises:
            ValueError: If the text gets longer than the checkpoint has positions.
        """
        step = state.cache.get_seq_length()
        self._check_positions(state.first_start, step + 1)
        # Utterances beyond the last position are over, but may not have left the search yet.
        places = (state.starts + step).clamp(max=self.positions - 1)
        places = places.repeat_interleave(state.beam_size).unsqueeze(1)
        hidden = self._decode(
            self._embed(tokens.unsqueeze(1)),
            self._blocks(state),
            places=places,
            cache=state.cache,
            shared_prefix=state.prefix,
        )
        # As in `generate`, what is suppressed keeps its share of the probability.
        scores = self.logits(hidden.squeeze(1)).float().log_softmax(dim=-1)
        scores = scores.masked_fill(self.suppressed, -torch.inf)
        return F.pad(scores, (self.first_token, 0), value=-torch.inf), state

    def reorder(self, state: CausalLMDecoderState, index: Tensor) -> CausalLMDecoderState:
        """Keeps the hypotheses of `index`; the caches are changed. See `ScorerInterface`."""
        state.cache.reorder_cache(index)
        return leave_out_finished(state, index, "starts", "memory", "memory_mask", "prefix")

    def _blocks(self, state: CausalLMDecoderState) -> list[Callable[[Tensor], Tensor]]:
        """The blocks of cross-attention, each with the memory of a search."""
        options = {"mask": state.memory_mask, "beam_size": state.beam_size}
        return [
            partial(block.attend, keys=keys, values=values, **options)
            for block, (keys, values) in zip(self.cross_attention, state.memory, strict=True)
        ]

    def _decode(
        self,
        hidden: Tensor,
        blocks: list[Callable[[Tensor], Tensor]],
        *,
        places: Tensor | None = None,
        cache: DynamicCache | None = None,
        shared_prefix: SharedPrefix | None = None,
    ) -> Tensor:
        """Applies layers and blocks of cross-attention; see `run_layers`. Places begin at 0."""
        layers = range(0, self.backbone.config.num_hidden_layers, self.cross_every)
        if places is None:
            places = torch.arange(hidden.size(1), device=hidden.device).unsqueeze(0)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return run_layers(
            self.backbone.model,
            hidden,
            places,
            dict(zip(layers, blocks, strict=False)),
            cache=cache,
            shared_prefix=shared_prefix,
            compute_again=again and cache is None,
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of ids of the project; hypotheses that are over may hold blanks."""
        return self.backbone.get_input_embeddings()((tokens - self.first_token).clamp(min=0))

    def _sequence(
        self, tokens: Tensor, memory: Tensor, memory_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of prompt, memory if it is a prefix, and text.

        Args:
            tokens: Token ids from sos on, (B, U), or none yet, (B, 0).
            memory: Encoder output, (B, T, memory_dim).
            memory_lengths: Real frames, (B,).

        Returns:
            Embeddings, (B, S, D), all padding at the end, and the position of sos, (B,), on the
            host.
        """
        length = max(tokens.size(1), 1)  # A search begins with sos.
        before = (self.prompt[:-1] + self.first_token).expand(len(tokens), -1)
        embedded = self._embed(torch.cat([before, tokens], dim=1))
        starts = torch.full_like(memory_lengths, before.size(1))
        if self.memory_prefix is not None:
            prefix, prefix_lengths = self.memory_prefix(memory, memory_lengths)
            prefix = prefix[:, : prefix_lengths.max()].to(embedded.dtype)
            self._check_positions(prefix.size(1) + before.size(1), length)
            first = torch.cat([embedded[:, :1], prefix], dim=1)
            embedded = join(first, prefix_lengths + 1, embedded[:, 1:])
            starts = starts + prefix_lengths
        else:
            self._check_positions(before.size(1), length)
        return embedded, starts

    def _check_positions(self, before: int, tokens: int) -> None:
        """Raises a `ValueError` if text from sos on does not fit behind what precedes it."""
        if before + tokens <= self.positions:
            return
        remedy = "leave the utterance out, or choose another --decoder-name"
        what = f"{len(self.prompt)} of the prompt"
        if self.memory_prefix is not None:
            memory = before - len(self.prompt) + 1
            what = f"{memory} of the encoder's output and {what}"
            remedy = f"raise --llama-downsample, {self.memory_prefix.downsample} now, {remedy}"
        raise ValueError(
            f"{before + tokens} positions are needed, {what} among them, but the language "
            f"model has {self.positions}: {remedy}"
        )


def _check_options(
    prompt: tuple[int, ...], conditioning: str, cross_every: int, downsample: int
) -> None:
    """Raises a `ValueError` for options that no checkpoint can take."""
    if conditioning not in LLAMA_CONDITIONINGS:
        raise ValueError(
            f"--llama-conditioning {conditioning} is unknown: choose one of "
            f"{', '.join(LLAMA_CONDITIONINGS)}"
        )
    if cross_every < 1 or downsample < 1:
        raise ValueError(
            f"--llama-cross-every {cross_every} with --llama-downsample {downsample}: both must "
            "be at least 1"
        )
    if not prompt:
        raise ValueError(
            "the prompt is empty: it must have BOS, or what stands in for it, at least"
        )
    if conditioning == "prefix" and len(prompt) < 2:
        raise ValueError(
            f"the prompt has {len(prompt)} token: with --llama-conditioning prefix the memory "
            "follows it, so give an instruction of at least one token to stand before the text"
        )
