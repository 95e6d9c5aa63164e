"""Which decoders there are, what each needs, and what they go with; nothing here imports torch."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from espnet.formats import MODALITIES
from espnet.nets.encoders import WHISPER_LAYERS, EncoderOptions, folder_problem
from espnet.option_tree import COUNT, needs_problems, option, value_problems

# Causal language models of transformers that are built like LLaMA: tests compare each with its own
# forward pass and `generate`.
CAUSAL_LM_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3"),
    *("gemma", "gemma2", "gemma3_text"),
)
LLAMA_CONDITIONINGS = ("cross-attention", "prefix")
DTYPES = ("auto", "float32", "bfloat16")
WHISPER_TASKS = ("transcribe", "translate")


@dataclass(frozen=True)
class DecoderChoice:
    """What is known of a decoder before it is built.

    Attributes:
        ctc_weight: CTC's share of the loss unless another is given.
        checkpoint: Hub id of the checkpoint that is used unless another is named; None for a
            decoder that starts from random weights, over a SentencePiece vocabulary.
        model_types: Architectures, as config.json names them, whose checkpoints it loads.
        lora_targets: Names of the linear layers in its attention and feed-forward blocks, which
            adapters go into.
        beam_size: Hypotheses of the search, unless told otherwise.
        audio_encoder: The encoder that its checkpoints were trained with. Behind it, one
            checkpoint is both, no Conformer is between them, and the next two are the defaults.
        frame_rate: Frames a second that it expects.
        margin: Seconds of silence that it wants after an utterance.
    """

    ctc_weight: float
    checkpoint: str | None = None
    model_types: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()
    beam_size: int = 5
    audio_encoder: str | None = None
    frame_rate: int = 25
    margin: float = 0.0

    @property
    def pretrained(self) -> bool:
        """Whether it loads a checkpoint of transformers, and speaks its vocabulary."""
        return self.checkpoint is not None


DECODERS = {
    "transformer": DecoderChoice(0.1, beam_size=40),
    "llama": DecoderChoice(
        0.0,
        "meta-llama/Llama-3.2-1B",
        CAUSAL_LM_TYPES,
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "whisper": DecoderChoice(
        0.0,
        "openai/whisper-small",
        ("whisper",),
        WHISPER_LAYERS,
        audio_encoder="whisper",
        frame_rate=50,
        margin=2.0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a decoder must know of its text transform.

    Attributes:
        odim: Number of ids V, the blank (0) included.
        sos: Id that begins a decoder's input.
        eos: Id that ends its output.
        prompt: Ids of a pretrained tokenizer (one less than the model's) that come before the
            text, the last one being `sos`; empty for a vocabulary of this project.
        special_tokens: Ids of a pretrained tokenizer that a search must never choose.
        fingerprint: Of its tokens in their order; None if they are not known.
    """

    odim: int
    sos: int
    eos: int
    prompt: tuple[int, ...] = ()
    special_tokens: tuple[int, ...] = ()
    fingerprint: str | None = None


def vocabulary_fingerprint(token_list: Sequence[str]) -> str:
    """Tells vocabularies apart whose ids stand for other tokens, also those of the same size."""
    return hashlib.sha256("\n".join(token_list).encode()).hexdigest()[:16]


PRETRAINED = tuple(name for name, choice in DECODERS.items() if choice.pretrained)
OF_PRETRAINED = {"decoder": PRETRAINED}
OF_LLAMA = {"decoder": ("llama",)}
OF_PREFIX = {**OF_LLAMA, "llama_conditioning": ("prefix",)}
OF_WHISPER = {"decoder": ("whisper",)}


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """What writes the transcript; each field is a flag of that name."""

    title: ClassVar[str] = "decoder"

    decoder: str = option(
        "transformer",
        "Transformer over a SentencePiece vocabulary, or a pretrained language model (LLaMA, "
        "Mistral, Qwen, SmolLM3, Gemma: --decoder llama) or Whisper with its "
        "own",
        choices=tuple(DECODERS),
    )
    decoder_name: str | None = option(
        None,
        "checkpoint of it, with its tokenizer: a Hugging Face hub id, or a folder (default: "
        f"{', '.join(f'{name}: {DECODERS[name].checkpoint}' for name in PRETRAINED)})",
        metavar="ID|FOLDER",
    )
    freeze_decoder: bool | None = option(
        None,
        "leave the weights of its checkpoint as they are (default: if it has one)",
        negatable=True,
        needs=OF_PRETRAINED,
    )
    decoder_dtype: str = option(
        "auto",
        "precision of a frozen checkpoint's weights; auto: bfloat16 on a GPU that has it, else "
        "float32",
        choices=DTYPES,
    )
    llama_conditioning: str = option(
        "cross-attention",
        "gated cross-attention blocks between LLaMA's layers, or the encoder's output as a prefix "
        "of the text",
        choices=LLAMA_CONDITIONINGS,
        needs=OF_LLAMA,
    )
    llama_cross_every: int = option(
        4,
        "a cross-attention block before every N-th layer",
        kind=COUNT,
        metavar="N",
        needs={**OF_LLAMA, "llama_conditioning": ("cross-attention",)},
    )
    llama_downsample: int = option(
        3,
        "frames that are stacked into one embedding of the prefix",
        kind=COUNT,
        metavar="N",
        needs=OF_PREFIX,
    )
    llama_prefix_ctc: bool = option(
        False,
        "CTC's loss is that of the prefix, over the language model's embeddings of the tokens of a "
        "batch, and there is no CTC layer: a language model then listens early",
        needs=OF_PREFIX,
    )
    llama_prompt: str = option(
        "Transcribe speech to text.", "instruction between prefix and text", needs=OF_PREFIX
    )
    whisper_language: str | None = option(
        None, "code of the language, as en (default: en)", needs=OF_WHISPER
    )
    whisper_task: str = option("transcribe", choices=WHISPER_TASKS, needs=OF_WHISPER)
    whisper_gated_video: bool = option(
        False,
        "video enters each block of Whisper's decoder by a gated cross-attention of its own, and "
        "the encoder's output is the audio's alone",
        needs=OF_WHISPER,
    )
    text_case: str | None = option(
        None,
        "case of the text that a pretrained decoder learns (default: lower)",
        choices=("keep", "lower"),
    )

    @property
    def choice(self) -> DecoderChoice:
        """The row of the decoder."""
        return DECODERS[self.decoder]

    def resolved(self) -> "DecoderOptions":
        """The same, with the checkpoint, freezing and case that follow from the rest."""
        pretrained = self.choice.pretrained
        return replace(
            self,
            freeze_decoder=pretrained if self.freeze_decoder is None else self.freeze_decoder,
            decoder_name=self.decoder_name or self.choice.checkpoint,
            text_case=self.text_case or ("lower" if pretrained else "keep"),
        )


def are_one(encoders: EncoderOptions, decoder: DecoderOptions) -> bool:
    """Whether a decoder attends to the encoder that it was trained with, as Whisper's does.

    Args:
        encoders: Resolved.
        decoder: Of the same model.
    """
    return decoder.choice.audio_encoder == encoders.audio_encoder is not None


def resolve_parts(
    encoders: EncoderOptions, decoder: DecoderOptions
) -> tuple[EncoderOptions, DecoderOptions]:
    """Fills in all that follows from the rest, also what encoders and decoder want of each other.

    Args:
        encoders: As they were given, free of contradictions, or resolved.
        decoder: Likewise.

    Returns:
        Both, resolved.
    """
    one = are_one(encoders.resolved(), decoder)
    if one:  # One name stands for both.
        name = encoders.audio_encoder_name or decoder.decoder_name
        encoders = replace(encoders, audio_encoder_name=name)
        decoder = replace(decoder, decoder_name=decoder.decoder_name or name)
    encoders, decoder = encoders.resolved(), decoder.resolved()
    changes = {}
    if encoders.frame_rate is None:
        changes["frame_rate"] = decoder.choice.frame_rate if one else 25
    if encoders.whisper_margin is None:
        hears = encoders.choice("audio")
        changes["whisper_margin"] = decoder.choice.margin if hears and hears.has_margin else 0.0
    return replace(encoders, **changes), decoder


def decoder_problems(modality: str, options: DecoderOptions) -> list[str]:
    """What does not fit together, in terms of flags.

    Args:
        modality: `audio`, `video` or `audiovisual`.
        options: As they were given, or resolved.

    Returns:
        A sentence a problem; empty if there is none.
    """
    if problems := value_problems(options):
        return problems
    resolved = options.resolved()
    checkpoint = options.decoder_name
    if checkpoint is not None and not options.choice.pretrained:
        problems.append(
            f"--decoder-name {checkpoint}, but {options.decoder} loads no checkpoint: choose "
            f"--decoder {' or '.join(PRETRAINED)}"
        )
    elif checkpoint is not None:
        problem = folder_problem("--decoder-name", checkpoint, options.choice.model_types)
        problems += [problem] if problem else []
    problems += needs_problems(options, resolved)
    if options.text_case == "lower" and not options.choice.pretrained:
        problems.append(f"--text-case lower needs --decoder {' or '.join(PRETRAINED)}")
    if options.decoder_dtype == "bfloat16" and not resolved.freeze_decoder:
        problems.append(
            "--decoder-dtype bfloat16 needs a frozen decoder: its updates would be rounded away"
        )
    if options.whisper_gated_video and len(MODALITIES[modality]) < 2:
        problems.append(
            f"--whisper-gated-video needs a model of video and audio, got one of {modality} alone"
        )
    return problems
