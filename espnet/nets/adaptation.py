"""Which parts of a recogniser adapters can train, and with what; nothing here imports torch."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import ClassVar

from espnet.nets.decoders import DecoderOptions
from espnet.nets.encoders import TABLES, EncoderOptions
from espnet.option_tree import COUNT, POSITIVE, SHARE, option, value_problems

PARTS = ("vision", "audio", "encoder", "decoder")
REQUIREMENTS = {"bitsandbytes": "bitsandbytes>=0.46", "peft": "peft>=0.17"}
INSTALLED = {package for package in REQUIREMENTS if find_spec(package)}


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions:
    """What is adapted instead of trained as a whole; each field is a flag of that name."""

    title: ClassVar[str] = "adaptation"

    use_qlora: bool = option(
        False,
        "put the linear layers of --qlora-parts into 4 bits, and train low-rank adapters beside "
        "them instead of the weights",
    )
    use_lora: bool = option(False, "the same adapters without the 4 bits")
    qlora_parts: tuple[str, ...] | None = option(
        None,
        f"parts that are adapted, for --use-lora too: {' '.join(PARTS)}; encoder is the Conformer "
        "(default: every pretrained part)",
        choices=PARTS,
        nargs="+",
        metavar="PART",
    )
    lora_rank: int = option(16, "rank of the updates", kind=COUNT)
    lora_alpha: float = option(32.0, "updates are scaled by alpha / rank", kind=POSITIVE)
    lora_dropout: float = option(0.05, "dropout on what the adapters take", kind=SHARE)
    lora_targets: tuple[str, ...] | None = option(
        None,
        "linear layers that get adapters, by their name's last parts, with * for anything: q_proj, "
        "layers.0.* (default: all of attention and feed-forward blocks)",
        nargs="+",
        metavar="NAME",
    )

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
    if problems := value_problems(options):
        return problems
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
        if part in TABLES and part not in pretrained:
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
    parts = [word for word in TABLES if (row := encoders.choice(word)) and row.pretrained]
    return parts + ["decoder"] * decoder.choice.pretrained
