"""The options of a whole model, what follows from them, and what does not fit together."""

from dataclasses import dataclass, replace
from typing import ClassVar

from espnet.nets.adaptation import AdaptationOptions, adaptation_problems
from espnet.nets.decoders import DecoderOptions, are_one, decoder_problems, resolve_parts
from espnet.nets.encoders import EncoderOptions, encoder_problems
from espnet.option_tree import COUNT, NATURAL, PROBABILITY, Number, branch, option, value_problems

FUSIONS = ("concat",)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What model to build; the defaults are auto_avsr's. Each field is a flag of that name."""

    title: ClassVar[str] = "model"

    encoders: EncoderOptions = branch(EncoderOptions)
    adim: int | None = option(
        None,
        "feature size (default: 768, but without encoder blocks that of a pretrained audio "
        "encoder)",
        kind=COUNT,
    )
    fusion: str = option("concat", "what makes one sequence of the streams", choices=FUSIONS)
    aheads: int = option(12, "attention heads", kind=COUNT)
    eunits: int = option(3072, "encoder feed-forward units", kind=COUNT)
    elayers: int | None = option(
        None,
        "encoder blocks, 0 leaves the encoder out (default: 12, but 0 from Whisper's encoder to "
        "Whisper's decoder)",
        kind=NATURAL,
    )
    dunits: int = option(3072, "decoder feed-forward units", kind=COUNT)
    dlayers: int = option(6, "decoder blocks", kind=COUNT)
    cnn_module_kernel: int = option(31, "Conformer kernel, odd", kind=COUNT)
    dropout_rate: float = option(0.1, kind=PROBABILITY)
    label_smoothing: float | None = option(
        None,
        "of the decoder's targets (default: 0.1, but 0 for pretrained decoders)",
        kind=Number(float, "a number in [0, 0.9]", lambda value: 0 <= value <= 0.9),
    )
    ctc_weight: float | None = option(
        None,
        "CTC's share of the loss; 0: no CTC layer (default: 0.1, but 0 for pretrained decoders)",
        kind=PROBABILITY,
    )
    modality_dropout: tuple[float, float] = option(
        (0.0, 0.0),
        "probabilities that a training utterance loses its audio, its video (default: 0 0); the "
        "model then also takes one stream alone",
        kind=PROBABILITY,
        nargs=2,
        metavar=("P_AUDIO", "P_VIDEO"),
    )
    gradient_checkpointing: bool = option(
        True,
        "pretrained parts through which gradients flow compute their activations again in the "
        "backward pass, which saves memory (default: True)",
        negatable=True,
    )
    decoder: DecoderOptions = branch(DecoderOptions)
    adaptation: AdaptationOptions = branch(AdaptationOptions)

    def resolved(self) -> "ModelOptions":
        """The same, with all that follows from the rest but what only a checkpoint tells.

        Raises:
            ValueError: If something does not fit together.
        """
        if problems := model_problems(self):
            raise ValueError("; ".join(problems))
        encoders, decoder = resolve_parts(self.encoders, self.decoder)
        elayers = _elayers(self, encoders)
        choice = decoder.choice
        smoothing = 0.0 if choice.pretrained else 0.1
        return replace(
            self,
            encoders=encoders,
            decoder=decoder,
            adaptation=self.adaptation.resolved(encoders, decoder),
            elayers=elayers,
            adim=_adim(self, encoders, elayers),
            ctc_weight=choice.ctc_weight if self.ctc_weight is None else self.ctc_weight,
            label_smoothing=smoothing if self.label_smoothing is None else self.label_smoothing,
        )


def model_problems(options: ModelOptions) -> list[str]:
    """What does not fit together, in terms of flags.

    Args:
        options: As they were given, or resolved.

    Returns:
        A sentence a problem; empty if there is none.
    """
    if problems := value_problems(options):
        return problems
    encoders = options.encoders.resolved()
    if encoders.modality is None:
        return ["--modality, --vision-encoder or --audio-encoder must be given"]
    problems += encoder_problems(options.encoders)
    problems += decoder_problems(encoders.modality, options.decoder)
    if not problems:
        parts = resolve_parts(options.encoders, options.decoder)
        problems += adaptation_problems(options.adaptation, *parts, _elayers(options, encoders))
    elayers = _elayers(options, encoders)
    adim = _adim(options, encoders, elayers)
    attends = elayers or not options.decoder.choice.pretrained  # with so many heads
    if attends and adim is not None and (adim % options.aheads or adim % 2):
        problems.append(f"--adim {adim} must be even and a multiple of --aheads {options.aheads}")
    if options.cnn_module_kernel % 2 == 0:
        problems.append(f"--cnn-module-kernel {options.cnn_module_kernel} must be odd")
    if sum(options.modality_dropout) > 1:
        problems.append(f"--modality-dropout {options.modality_dropout}: the sum must be at most 1")
    if any(options.modality_dropout) and len(encoders.streams) < 2:
        problems.append(
            f"--modality-dropout needs a model of video and audio, not of {encoders.modality} "
            "alone, which has no stream to spare"
        )
    return problems


def _elayers(options: ModelOptions, encoders: EncoderOptions) -> int:
    """Blocks of the Conformer: none between an encoder and the decoder that it was trained with."""
    if options.elayers is not None:
        return options.elayers
    return 0 if are_one(encoders, options.decoder) else 12


def _adim(options: ModelOptions, encoders: EncoderOptions, elayers: int) -> int | None:
    """Feature size; None: that of the audio encoder's features, which its checkpoint tells."""
    hears = encoders.choice("audio")
    of_checkpoint = hears is not None and hears.pretrained and not elayers
    return options.adim or (None if of_checkpoint else 768)
