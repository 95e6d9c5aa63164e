"""Which parts of a recogniser adapters can train, and with what; nothing here imports torch."""

from dataclasses import dataclass, replace
from importlib.util import find_spec

from espnet.nets.decoders import DECODERS, DecoderOptions
from espnet.nets.encoders import TABLES, EncoderOptions

PARTS = ("vision", "audio", "encoder", "decoder")
REQUIREMENTS = {"bitsandbytes": "bitsandbytes>=0.46", "peft": "peft>=0.17"}
INSTALLED = {package for package in REQUIREMENTS if find_spec(package)}


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions:
    """What is adapted instead of trained as a whole; each field is a flag of that name.

    Attributes:
        use_qlora: Whether the parts' linear layers are in 4 bits, with trained adapters beside
            them.
        use_lora: Whether they get adapters, but keep their precision.
        qlora_parts: Names of `PARTS` that are adapted; None: every pretrained part.
        lora_rank: Rank of the adapters' updates.
        lora_alpha: The updates are scaled by alpha / rank.
        lora_dropout: Dropout on what the adapters take.
        lora_targets: Names of the linear layers that get adapters, as `qlora_utils.add_lora` takes
            them; each must be in one of the parts. None: all of attention and feed-forward blocks.
    """

    use_qlora: bool = False
    use_lora: bool = False
    qlora_parts: tuple[str, ...] | None = None
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] | None = None

    @property
    def enabled(self) -> bool:
        """Whether anything is adapted."""
        return self.use_qlora or self.use_lora

    def resolved(self, encoders: EncoderOptions, decoder: DecoderOptions) -> "AdaptationOptions":
        """The same, with the parts that follow from the encoders and the decoder.

        Args:
            encoders: Resolved.
            decoder: Resolved.
        """
        if not self.enabled or self.qlora_parts is not None:
            return self
        return replace(self, qlora_parts=tuple(_pretrained_parts(encoders, decoder)))


def adaptation_problems(
    options: AdaptationOptions, encoders: EncoderOptions, decoder: DecoderOptions, elayers: int
) -> list[str]:
    """What does not fit together, in terms of flags.

    Args:
        options: As they were given, or resolved.
        encoders: Resolved.
        decoder: Resolved.
        elayers: Blocks of the Conformer.

    Returns:
        A sentence a problem; empty if there is none.
    """
    if not options.enabled:
        given = {"--qlora-parts": options.qlora_parts, "--lora-targets": options.lora_targets}
        return [
            f"{flag} {' '.join(value)} needs --use-qlora or --use-lora"
            for flag, value in given.items()
            if value is not None
        ]
    flag = "--use-qlora" if options.use_qlora else "--use-lora"
    if options.use_qlora and options.use_lora:
        return ["--use-qlora and --use-lora contradict each other: leave one out"]
    packages = ["peft"] + ["bitsandbytes"] * options.use_qlora
    problems = [
        f"{flag} needs {package}, but it is not installed: {install_command(package)}"
        for package in packages
        if package not in INSTALLED
    ]
    pretrained = _pretrained_parts(encoders, decoder)
    parts = pretrained if options.qlora_parts is None else options.qlora_parts
    if not parts:
        problems.append(
            f"{flag} adapts pretrained parts, but there is none: leave it out, or name parts that "
            "start from --pretrained-model-path (--qlora-parts encoder decoder)"
        )
    for part in parts:
        if part not in PARTS:
            problems.append(f"--qlora-parts {part} is unknown: choose among {', '.join(PARTS)}")
        elif part in TABLES and part not in pretrained:
            encoder = getattr(encoders, f"{part}_encoder") or "none"
            problems.append(
                f"--qlora-parts {part} needs a pretrained --{part}-encoder, got {encoder}"
            )
        elif part == "encoder" and not elayers:
            problems.append("--qlora-parts encoder, but --elayers 0 leaves the encoder out")
    adapted = tuple(part for part in parts if part in pretrained)
    return problems + _freezing_problems(flag, adapted, encoders, decoder)


def _freezing_problems(
    flag: str, parts: tuple[str, ...], encoders: EncoderOptions, decoder: DecoderOptions
) -> list[str]:
    """What is asked to be trained though it is pretrained and adapted."""
    problems = []
    for part in parts:
        word = f"{part}-encoder" if part in TABLES else part
        freeze = {
            "vision": encoders.freeze_vision_encoder,
            "audio": encoders.freeze_audio_encoder,
            "decoder": decoder.freeze_decoder,
        }
        if freeze[part] is False:
            problems.append(
                f"--no-freeze-{word} contradicts {flag}, which freezes the weights that it adapts: "
                "leave one out, or name other --qlora-parts"
            )
    if encoders.unfreeze_last_layers and set(parts) & set(TABLES):
        problems.append(
            f"--unfreeze-last-layers {encoders.unfreeze_last_layers} contradicts {flag} on "
            "encoders: leave one out, or name other --qlora-parts"
        )
    return problems


def install_command(package: str) -> str:
    """The command that installs a package, or brings it up to date."""
    return f'pip install -U "{REQUIREMENTS[package]}"'


def _pretrained_parts(encoders: EncoderOptions, decoder: DecoderOptions) -> list[str]:
    parts = [
        word
        for word, table in TABLES.items()
        if (name := getattr(encoders, f"{word}_encoder")) and table[name].pretrained
    ]
    return parts + ["decoder"] * DECODERS[decoder.decoder].pretrained
