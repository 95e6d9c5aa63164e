"""Which encoders there are, what each needs, and which of them fit together.

The flags and the model are checked against this one table; nothing here imports torch.
"""

import json
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from espnet.formats import MODALITIES
from espnet.option_tree import (
    COUNT,
    NATURAL,
    NON_NEGATIVE,
    needs_problems,
    option,
    value_problems,
)

FRAME_RATES = (25, 50)  # frames a second at which the streams are fused
POOLINGS = ("cls", "mean")
WHISPER_SECONDS = 30  # what Whisper's encoder was trained on, and takes at most
WHISPER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class EncoderChoice:
    """What is known of an encoder before it is built.

    Attributes:
        checkpoint: Hub id of the checkpoint that is used unless another is named; None for an
            encoder that starts from random weights.
        model_types: Architectures, as config.json names them, whose checkpoints it loads.
        lora_targets: Names of the linear layers in its attention and feed-forward blocks, which
            adapters go into.
        images: Whether it takes each frame as an image, whose size and pooling are options.
        normalized_audio: Whether it takes audio layer-normalised over the utterance.
        max_seconds: Longest utterance in seconds; None for no limit.
        has_margin: Whether it can put silence after an utterance.
    """

    checkpoint: str | None = None
    model_types: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()
    images: bool = False
    normalized_audio: bool = True
    max_seconds: int | None = None
    has_margin: bool = False

    @property
    def pretrained(self) -> bool:
        """Whether it loads a checkpoint of transformers."""
        return self.checkpoint is not None


VISION_ENCODERS = {
    "resnet": EncoderChoice(),
    "vit": EncoderChoice(
        "google/vit-base-patch16-224-in21k",
        ("vit",),
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        images=True,
    ),
    "clip": EncoderChoice(
        "openai/clip-vit-base-patch16",
        ("clip", "clip_vision_model"),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        images=True,
    ),
}
AUDIO_ENCODERS = {
    "resnet1d": EncoderChoice(),
    "fbank": EncoderChoice(),
    "whisper": EncoderChoice(
        "openai/whisper-small",
        ("whisper",),
        WHISPER_LAYERS,
        normalized_audio=False,
        max_seconds=WHISPER_SECONDS,
        has_margin=True,
    ),
    "wavlm": EncoderChoice(
        "microsoft/wavlm-base-plus",
        ("wavlm",),
        ("q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"),
    ),
}
TABLES = {"vision": VISION_ENCODERS, "audio": AUDIO_ENCODERS}


def pretrained_of(table: dict[str, EncoderChoice]) -> list[str]:
    """Names of the encoders of a table that load a checkpoint."""
    return [name for name, choice in table.items() if choice.pretrained]


def _usual(table: dict[str, EncoderChoice]) -> str:
    return ", ".join(
        f"{n}: {choice.checkpoint}" for n, choice in table.items() if choice.pretrained
    )


def seconds(text: str) -> float:
    """Parses a number of seconds, of at least 0, which may end in `s`: `2`, `0.5s`, `30s`."""
    try:
        return NON_NEGATIVE(text.removesuffix("s"))
    except ValueError:
        raise ArgumentTypeError(f"{text} is no number of seconds: 2 or 30s, say") from None


def hidden_layer(text: str) -> int | str:
    """Parses a number of a hidden layer from -1 on, or `weighted`."""
    if text == "weighted":
        return text
    try:
        value = int(text)
    except ValueError:
        value = -2
    if value < -1:
        raise ArgumentTypeError(f"{text} is no hidden layer: -1, a number from 0, or weighted")
    return value


OF_IMAGES = {"vision_encoder": tuple(n for n, row in VISION_ENCODERS.items() if row.images)}
WITH_MARGIN = {"audio_encoder": tuple(n for n, row in AUDIO_ENCODERS.items() if row.has_margin)}


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """How the streams are encoded; each field is a flag of that name."""

    title: ClassVar[str] = "encoders"

    modality: str | None = option(
        None,
        "streams that the model takes (default: those of the encoders)",
        choices=tuple(MODALITIES),
    )
    vision_encoder: str | None = option(
        None,
        "video front-end: auto_avsr's ResNet, or a pretrained ViT or CLIP on each frame (default: "
        "resnet if the modality has video)",
        choices=tuple(VISION_ENCODERS),
    )
    audio_encoder: str | None = option(
        None,
        "audio front-end: auto_avsr's ResNet on the waveform, a log-mel filter bank with two "
        "convolutions, or a pretrained Whisper or WavLM (default: resnet1d if the modality has "
        "audio)",
        choices=tuple(AUDIO_ENCODERS),
    )
    vision_encoder_name: str | None = option(
        None,
        "checkpoint of it: a Hugging Face hub id, or a folder as save_pretrained leaves it "
        f"(default: {_usual(VISION_ENCODERS)})",
        metavar="ID|FOLDER",
    )
    audio_encoder_name: str | None = option(
        None,
        f"likewise (default: {_usual(AUDIO_ENCODERS)})",
        metavar="ID|FOLDER",
    )
    freeze_vision_encoder: bool | None = option(
        None, "leave its weights as they are (default: if it is pretrained)", negatable=True
    )
    freeze_audio_encoder: bool | None = option(
        None, "leave its weights as they are (default: if it is pretrained)", negatable=True
    )
    unfreeze_last_layers: int = option(
        0, "train the last N layers of frozen pretrained encoders", kind=NATURAL, metavar="N"
    )
    encoder_layer: int | str = option(
        -1,
        "hidden layer of pretrained encoders that feeds the fusion, 0 being the input of the "
        "first; -1: their output; weighted: a learned mean over all",
        kind=hidden_layer,
        metavar="-1|K|weighted",
    )
    frame_rate: int | None = option(
        None,
        "frames a second at which the streams are fused: at 25, features of Whisper and WavLM are "
        "stacked in pairs, at 50, video is repeated (default: 25, but 50 from Whisper's encoder to "
        "Whisper's decoder)",
        kind=int,
        choices=FRAME_RATES,
    )
    video_width: int = option(64, "channels of the video ResNet", kind=COUNT)
    audio_width: int = option(64, "channels of the audio ResNet", kind=COUNT)
    vision_pooling: str = option(
        "cls",
        "feature of a frame: ViT's and CLIP's class token, or the mean over their patches",
        choices=POOLINGS,
        needs=OF_IMAGES,
    )
    vision_image_size: int | None = option(
        None,
        "side to which ViT and CLIP resize frames; 224 is most checkpoints' own (default: the "
        "smallest multiple of the patch size that holds the crop)",
        kind=COUNT,
        metavar="PIXELS",
        needs=OF_IMAGES,
    )
    vision_chunk_frames: int = option(
        128, "frames that ViT and CLIP encode at once; bounds the memory", kind=COUNT
    )
    whisper_margin: float | None = option(
        None,
        "silence that follows an utterance in Whisper's encoder; 30s: as much as it takes "
        "(default: 0, but 2 with --decoder whisper: where no silence follows the words, Whisper "
        "repeats them)",
        kind=seconds,
        metavar="SECONDS|30s",
        needs=WITH_MARGIN,
    )
    whisper_pad_30s: bool = option(
        False,
        "the same as --whisper-margin 30s, as Whisper was trained: slower",
        needs=WITH_MARGIN,
    )

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams that the model takes, of options whose modality is resolved."""
        return MODALITIES[self.modality]

    def choice(self, word: str) -> EncoderChoice | None:
        """The row of the encoder of `vision` or `audio`; None if there is none."""
        return TABLES[word].get(getattr(self, f"{word}_encoder"))

    def resolved(self) -> "EncoderOptions":
        """The same, with the encoders, checkpoints and freezing that follow from the rest."""
        modality, *encoders = resolve_encoders(
            self.modality, self.vision_encoder, self.audio_encoder
        )
        changes = {"modality": modality}
        for (word, table), name in zip(TABLES.items(), encoders, strict=True):
            changes[f"{word}_encoder"] = name
            choice = table.get(name)
            if choice is not None and getattr(self, f"freeze_{word}_encoder") is None:
                changes[f"freeze_{word}_encoder"] = choice.pretrained
            if choice is not None and getattr(self, f"{word}_encoder_name") is None:
                changes[f"{word}_encoder_name"] = choice.checkpoint
        if self.whisper_pad_30s:
            changes["whisper_margin"] = float(WHISPER_SECONDS)
        return replace(self, **changes)


def resolve_encoders(
    modality: str | None, vision_encoder: str | None, audio_encoder: str | None
) -> tuple[str | None, str | None, str | None]:
    """Fills in what follows from the rest: the modality of encoders, the encoders of a modality.

    Args:
        modality: `audio`, `video`, `audiovisual`, or None where the encoders tell.
        vision_encoder: Name, or None for auto_avsr's if the modality has video.
        audio_encoder: Likewise for audio.

    Returns:
        The three; what nothing tells stays None. `encoder_problems` finds contradictions.
    """
    if modality is None and (vision_encoder or audio_encoder):
        both = vision_encoder and audio_encoder
        modality = "audiovisual" if both else "video" if vision_encoder else "audio"
    streams = MODALITIES.get(modality, ())
    if "video" in streams:
        vision_encoder = vision_encoder or "resnet"
    if "audio" in streams:
        audio_encoder = audio_encoder or "resnet1d"
    return modality, vision_encoder, audio_encoder


def encoder_problems(given: EncoderOptions) -> list[str]:
    """What does not fit together, in terms of flags.

    Args:
        given: As they were given, or resolved; they must tell the modality.

    Returns:
        A sentence a problem; empty if there is none.
    """
    if problems := value_problems(given):
        return problems
    options = given.resolved()
    for stream, word in (("video", "vision"), ("audio", "audio")):
        if stream in options.streams:
            problems += _checkpoint_problems(word, options)
        else:
            problems += _superfluous(word, given, options.modality)
    if problems:
        return problems
    pretrained = [word for word in TABLES if (row := options.choice(word)) and row.pretrained]
    if options.encoder_layer != -1 and not pretrained:
        problems.append(
            f"--encoder-layer {options.encoder_layer} needs a pretrained encoder: leave it out"
        )
    if options.unfreeze_last_layers and not any(
        getattr(options, f"freeze_{word}_encoder") for word in pretrained
    ):
        problems.append(
            f"--unfreeze-last-layers {options.unfreeze_last_layers} needs a pretrained encoder "
            "that is frozen: leave it out"
        )
    problems += needs_problems(given, options)
    margin = given.whisper_margin
    if margin is not None and not 0 <= margin <= WHISPER_SECONDS:
        problems.append(f"--whisper-margin {margin:g}: choose 0 to {WHISPER_SECONDS} seconds")
    if given.whisper_pad_30s and margin not in (None, WHISPER_SECONDS):
        problems.append(f"--whisper-pad-30s contradicts --whisper-margin {margin:g}: leave one out")
    return problems


def _checkpoint_problems(word: str, options: EncoderOptions) -> list[str]:
    """What is wrong with the checkpoint of a stream that the model takes."""
    choice = options.choice(word)
    checkpoint = getattr(options, f"{word}_encoder_name")
    if checkpoint is None:
        return []
    if not choice.pretrained:
        return [
            f"--{word}-encoder-name {checkpoint}, but {getattr(options, f'{word}_encoder')} loads "
            f"no checkpoint: choose --{word}-encoder {' or '.join(pretrained_of(TABLES[word]))}"
        ]
    problem = folder_problem(f"--{word}-encoder-name", checkpoint, choice.model_types)
    return [problem] if problem else []


def _superfluous(word: str, options: EncoderOptions, modality: str) -> list[str]:
    """What is said of the encoder of a stream that the model does not take."""
    freeze = getattr(options, f"freeze_{word}_encoder")
    given = {
        f"--{word}-encoder": getattr(options, f"{word}_encoder"),
        f"--{word}-encoder-name": getattr(options, f"{word}_encoder_name"),
    }
    flags = [f"{flag} {value}" for flag, value in given.items() if value is not None]
    if freeze is not None:
        flags.append(f"--{'' if freeze else 'no-'}freeze-{word}-encoder")
    return [f"{flag} contradicts --modality {modality}: leave one out" for flag in flags]


def folder_problem(flag: str, name: str, model_types: tuple[str, ...]) -> str | None:
    """What is wrong with a checkpoint in a local folder; whether a hub id exists is seen later.

    Args:
        flag: Command-line option that names it.
        name: Hub id or folder.
        model_types: Architectures that are expected.

    Returns:
        A sentence, or None if there is nothing to object to.
    """
    folder = Path(name)
    if not folder.is_dir():
        looks_like_path = folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
        if looks_like_path or folder.exists():
            return (
                f"{flag} {name} is no folder: give a folder with config.json and weights, or a "
                "hub id"
            )
        return None
    config = folder / "config.json"
    try:
        found = json.loads(config.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return f"{flag} {name} holds no readable config.json: give a folder of save_pretrained"
    if found not in model_types:
        return (
            f"{flag} {name} {type_problem(found, model_types)}: give the folder or hub id of such "
            "a checkpoint"
        )
    return None


def type_problem(found: str, model_types: tuple[str, ...]) -> str:
    """What is wrong with a checkpoint of another type, as the rest of a sentence that names it."""
    *others, last = model_types
    expected = f"{', '.join(others)} or {last}" if others else last
    return f"is a checkpoint of {found}, one of {expected} is expected"
