"""Which encoders there are, what each needs, and which of them fit together.

The flags and the model are checked against this one table; nothing here imports torch.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

STREAMS = {
    "audio": ("audio",),
    "video": ("video",),
    "audiovisual": ("video", "audio"),
}
FRAME_RATES = (25, 50)  # frames a second at which the streams are fused
POOLINGS = ("cls", "mean")
WHISPER_SECONDS = 30  # what Whisper's encoder was trained on, and takes at most


@dataclass(frozen=True)
class EncoderChoice:
    """What is known of an encoder before it is built.

    Attributes:
        checkpoint: Hub id of the checkpoint that is used unless another is named; None for an
            encoder that starts from random weights.
        model_types: Architectures, as config.json names them, whose checkpoints it loads.
        normalized_audio: Whether it takes audio layer-normalised over the utterance.
        max_seconds: Longest utterance in seconds; None for no limit.
    """

    checkpoint: str | None = None
    model_types: tuple[str, ...] = ()
    normalized_audio: bool = True
    max_seconds: int | None = None

    @property
    def pretrained(self) -> bool:
        """Whether it loads a checkpoint of transformers."""
        return self.checkpoint is not None


VISION_ENCODERS = {
    "resnet": EncoderChoice(),
    "vit": EncoderChoice("google/vit-base-patch16-224-in21k", ("vit",)),
    "clip": EncoderChoice("openai/clip-vit-base-patch16", ("clip", "clip_vision_model")),
}
AUDIO_ENCODERS = {
    "resnet1d": EncoderChoice(),
    "fbank": EncoderChoice(),
    "whisper": EncoderChoice(
        "openai/whisper-small",
        ("whisper",),
        normalized_audio=False,
        max_seconds=WHISPER_SECONDS,
    ),
    "wavlm": EncoderChoice("microsoft/wavlm-base-plus", ("wavlm",)),
}
TABLES = {"vision": VISION_ENCODERS, "audio": AUDIO_ENCODERS}


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """How the streams are encoded; each field is a flag of that name.

    Attributes:
        vision_encoder: A name of `VISION_ENCODERS`, None for auto_avsr's if there is video.
        audio_encoder: A name of `AUDIO_ENCODERS`, None for auto_avsr's if there is audio.
        vision_encoder_name: Hub id or folder of the checkpoint, None for the usual one.
        audio_encoder_name: Likewise for audio.
        freeze_vision_encoder: Whether it is not trained; None: so if it is pretrained.
        freeze_audio_encoder: Likewise for audio.
        unfreeze_last_layers: Layers at the end of frozen pretrained encoders that are trained.
        encoder_layer: Hidden layer of pretrained encoders that gives the features; -1: the last
            with the final norm, `weighted`: a learned mean over all.
        gradient_checkpointing: Whether pretrained parts through which gradients flow, the decoder
            too, compute their activations again in the backward pass, to save memory.
        frame_rate: Frames a second at which the streams are fused, 25 or 50; None: 50 from one
            Whisper to the other, else 25.
        video_width: An eighth of the size of `resnet`'s features.
        audio_width: An eighth of the size of `resnet1d`'s and `fbank`'s features.
        vision_pooling: `cls` (class token) or `mean` (over the patches) of `vit` and `clip`.
        vision_image_size: Side in pixels to which they resize frames; None: hardly at all.
        vision_chunk_frames: Frames that they encode at once.
        whisper_margin: Seconds of silence that `whisper` puts after an utterance; None: what the
            decoder needs.
        whisper_pad_30s: Whether the margin fills 30 s, as Whisper was trained.
    """

    vision_encoder: str | None = None
    audio_encoder: str | None = None
    vision_encoder_name: str | None = None
    audio_encoder_name: str | None = None
    freeze_vision_encoder: bool | None = None
    freeze_audio_encoder: bool | None = None
    unfreeze_last_layers: int = 0
    encoder_layer: int | str = -1
    gradient_checkpointing: bool = True
    frame_rate: int | None = None
    video_width: int = 64
    audio_width: int = 64
    vision_pooling: str = "cls"
    vision_image_size: int | None = None
    vision_chunk_frames: int = 128
    whisper_margin: float | None = None
    whisper_pad_30s: bool = False

    def resolved(self, modality: str) -> "EncoderOptions":
        """The same, with the encoders, checkpoints and freezing that follow from the rest.

        Args:
            modality: Of the model.
        """
        _, *encoders = resolve_encoders(modality, self.vision_encoder, self.audio_encoder)
        changes = dict(zip(("vision_encoder", "audio_encoder"), encoders, strict=True))
        for word, table in TABLES.items():
            choice = table.get(changes[f"{word}_encoder"])
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
    streams = STREAMS.get(modality, ())
    if "video" in streams:
        vision_encoder = vision_encoder or "resnet"
    if "audio" in streams:
        audio_encoder = audio_encoder or "resnet1d"
    return modality, vision_encoder, audio_encoder


def encoder_problems(modality: str, options: EncoderOptions) -> list[str]:
    """What does not fit together, in terms of flags.

    Args:
        modality: `audio`, `video` or `audiovisual`.
        options: As they were given, or resolved.

    Returns:
        A sentence a problem; empty if there is none.
    """
    problems = []
    for stream, word in (("video", "vision"), ("audio", "audio")):
        if stream in STREAMS[modality]:
            problems += _stream_problems(word, options.resolved(modality))
        else:
            problems += _superfluous(word, options, modality)
    if problems:
        return problems
    given, options = options, options.resolved(modality)
    used = {options.vision_encoder, options.audio_encoder}
    pretrained = [word for word, table in TABLES.items() if used & pretrained_of(table)]
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
    if options.vision_image_size and not used & pretrained_of(VISION_ENCODERS):
        problems.append(
            f"--vision-image-size {options.vision_image_size} needs --vision-encoder vit or clip"
        )
    if options.vision_pooling not in POOLINGS:
        problems.append(f"--vision-pooling {options.vision_pooling}: choose cls or mean")
    elif options.vision_pooling != "cls" and not used & pretrained_of(VISION_ENCODERS):
        problems.append(
            f"--vision-pooling {options.vision_pooling} needs --vision-encoder vit or clip"
        )
    problems += _whisper_problems(given, is_used="whisper" in used)
    if options.frame_rate not in (None, *FRAME_RATES):
        problems.append(f"--frame-rate {options.frame_rate}: choose 25 or 50")
    return problems


def _whisper_problems(options: EncoderOptions, *, is_used: bool) -> list[str]:
    """What is wrong with the silence after an utterance; `options` are not resolved."""
    margin, pad_30s = options.whisper_margin, options.whisper_pad_30s
    problems = []
    if pad_30s and not is_used:
        problems.append("--whisper-pad-30s needs --audio-encoder whisper")
    if margin is None:
        return problems
    if margin and not is_used:
        problems.append(f"--whisper-margin {margin:g} needs --audio-encoder whisper")
    if not 0 <= margin <= WHISPER_SECONDS:
        problems.append(f"--whisper-margin {margin:g}: choose 0 to {WHISPER_SECONDS} seconds")
    if pad_30s and margin != WHISPER_SECONDS:
        problems.append(f"--whisper-pad-30s contradicts --whisper-margin {margin:g}: leave one out")
    return problems


def pretrained_of(table: dict[str, EncoderChoice]) -> set[str]:
    """Names of the encoders of a table that load a checkpoint."""
    return {name for name, choice in table.items() if choice.pretrained}


def _stream_problems(word: str, options: EncoderOptions) -> list[str]:
    """What is wrong with the encoder and the checkpoint of a stream that the model takes."""
    name = getattr(options, f"{word}_encoder")
    checkpoint = getattr(options, f"{word}_encoder_name")
    table = TABLES[word]
    if name not in table:
        return [f"--{word}-encoder {name} is unknown: choose one of {', '.join(table)}"]
    if checkpoint is None:
        return []
    if not table[name].pretrained:
        return [
            f"--{word}-encoder-name {checkpoint}, but {name} loads no checkpoint: choose "
            f"--{word}-encoder {' or '.join(sorted(pretrained_of(table)))}"
        ]
    problem = folder_problem(f"--{word}-encoder-name", checkpoint, table[name].model_types)
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
