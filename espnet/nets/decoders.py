"""Which decoders there are, what each needs, and what they go with; nothing here imports torch."""

from dataclasses import dataclass, replace

from espnet.nets.encoders import (
    AUDIO_ENCODERS,
    STREAMS,
    EncoderOptions,
    folder_problem,
    pretrained_of,
)

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
        whisper_margin: Seconds of silence after an utterance that it wants of Whisper's encoder,
            unless told otherwise.
        beam_size: Hypotheses of the search, unless told otherwise.
    """

    ctc_weight: float
    checkpoint: str | None = None
    model_types: tuple[str, ...] = ()
    whisper_margin: float = 0.0
    beam_size: int = 5

    @property
    def pretrained(self) -> bool:
        """Whether it loads a checkpoint of transformers, and speaks its vocabulary."""
        return self.checkpoint is not None


DECODERS = {
    "transformer": DecoderChoice(0.1, beam_size=40),
    "llama": DecoderChoice(0.0, "meta-llama/Llama-3.2-1B", CAUSAL_LM_TYPES),
    "whisper": DecoderChoice(0.0, "openai/whisper-small", ("whisper",), whisper_margin=2.0),
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
    """

    odim: int
    sos: int
    eos: int
    prompt: tuple[int, ...] = ()
    special_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """What writes the transcript; each field is a flag of that name.

    Attributes:
        decoder: A name of `DECODERS`.
        decoder_name: Hub id or folder of the checkpoint, None for the usual one.
        freeze_decoder: Whether the checkpoint's weights are not trained; None: so if it has one.
        decoder_dtype: Precision of a frozen checkpoint's weights, one of `DTYPES`; `auto`:
            bfloat16 on a GPU that has it, else float32.
        llama_conditioning: `cross-attention`: gated blocks between the layers; `prefix`: the
            memory as embeddings before the text.
        llama_cross_every: Layers from one gated block to the next.
        llama_downsample: Frames that are stacked into one embedding of the prefix.
        whisper_gated_video: Whether Whisper's memory is the audio alone, and video enters each
            decoder block by a gated cross-attention of its own.
    """

    decoder: str = "transformer"
    decoder_name: str | None = None
    freeze_decoder: bool | None = None
    decoder_dtype: str = "auto"
    llama_conditioning: str = "cross-attention"
    llama_cross_every: int = 4
    llama_downsample: int = 3
    whisper_gated_video: bool = False

    def resolved(self) -> "DecoderOptions":
        """The same, with the checkpoint and freezing that follow from the rest."""
        choice = DECODERS[self.decoder]
        freeze = choice.pretrained if self.freeze_decoder is None else self.freeze_decoder
        return replace(
            self, freeze_decoder=freeze, decoder_name=self.decoder_name or choice.checkpoint
        )


def resolve_parts(
    modality: str, encoders: EncoderOptions, decoder: DecoderOptions
) -> tuple[EncoderOptions, DecoderOptions]:
    """Fills in all that follows from the rest, also what encoders and decoder want of each other.

    Args:
        modality: Of the model.
        encoders: As they were given, free of contradictions, or resolved.
        decoder: Likewise.

    Returns:
        Both, resolved.
    """
    if is_whisper(encoders.resolved(modality), decoder):  # One name stands for both.
        encoders, decoder = (
            replace(
                encoders, audio_encoder_name=encoders.audio_encoder_name or decoder.decoder_name
            ),
            replace(decoder, decoder_name=decoder.decoder_name or encoders.audio_encoder_name),
        )
    encoders, decoder = encoders.resolved(modality), decoder.resolved()
    changes = {}
    if encoders.frame_rate is None:
        changes["frame_rate"] = 50 if is_whisper(encoders, decoder) else 25
    if encoders.whisper_margin is None:
        hears = encoders.audio_encoder == "whisper"
        changes["whisper_margin"] = DECODERS[decoder.decoder].whisper_margin if hears else 0.0
    return replace(encoders, **changes), decoder


def is_whisper(encoders: EncoderOptions, decoder: DecoderOptions) -> bool:
    """Whether a Whisper's decoder attends to a Whisper's encoder: the model starts as Whisper."""
    return encoders.audio_encoder == "whisper" and decoder.decoder == "whisper"


def default_elayers(encoders: EncoderOptions, decoder: DecoderOptions) -> int:
    """Blocks of the Conformer unless told otherwise: none from one Whisper to the other."""
    return 0 if is_whisper(encoders, decoder) else 12


def default_adim(encoders: EncoderOptions, elayers: int) -> int | None:
    """Feature size unless told otherwise; None: that of the audio encoder's features.

    Args:
        encoders: Resolved.
        elayers: Blocks of the Conformer.
    """
    hears_pretrained = encoders.audio_encoder in pretrained_of(AUDIO_ENCODERS)
    return None if hears_pretrained and not elayers else 768


def decoder_problems(modality: str, options: DecoderOptions) -> list[str]:
    """What does not fit together, in terms of flags.

    Args:
        modality: `audio`, `video` or `audiovisual`.
        options: As they were given, or resolved.

    Returns:
        A sentence a problem; empty if there is none.
    """
    name, checkpoint = options.decoder, options.decoder_name
    if name not in DECODERS:
        return [f"--decoder {name} is unknown: choose one of {', '.join(DECODERS)}"]
    problems = []
    if not DECODERS[name].pretrained:
        pretrained = " or ".join(n for n, choice in DECODERS.items() if choice.pretrained)
        if checkpoint is not None:
            problems.append(
                f"--decoder-name {checkpoint}, but {name} loads no checkpoint: choose --decoder "
                f"{pretrained}"
            )
        if options.freeze_decoder:
            problems.append(f"--freeze-decoder needs --decoder {pretrained}")
    elif checkpoint is not None:
        problem = folder_problem("--decoder-name", checkpoint, DECODERS[name].model_types)
        problems += [problem] if problem else []
    if options.llama_conditioning not in LLAMA_CONDITIONINGS:
        problems.append(
            f"--llama-conditioning {options.llama_conditioning}: choose "
            f"{' or '.join(LLAMA_CONDITIONINGS)}"
        )
    prefix = name == "llama" and options.llama_conditioning == "prefix"
    usual = DecoderOptions()
    if options.llama_downsample != usual.llama_downsample and not prefix:
        problems.append(
            f"--llama-downsample {options.llama_downsample} needs --decoder llama "
            "--llama-conditioning prefix"
        )
    if options.llama_cross_every != usual.llama_cross_every and (name != "llama" or prefix):
        problems.append(
            f"--llama-cross-every {options.llama_cross_every} needs --decoder llama "
            "--llama-conditioning cross-attention"
        )
    if options.decoder_dtype == "bfloat16" and not options.resolved().freeze_decoder:
        problems.append(
            "--decoder-dtype bfloat16 needs a frozen decoder: its updates would be rounded away"
        )
    if options.whisper_gated_video and (name != "whisper" or len(STREAMS[modality]) < 2):
        problems.append(
            f"--whisper-gated-video needs --decoder whisper and a model of video and audio, got "
            f"{name} and {modality}"
        )
    return problems
