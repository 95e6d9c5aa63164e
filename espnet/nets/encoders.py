"""Which encoders there are, what each needs, and which of them fit together.

The flags and the model are checked against this one table; nothing here imports torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

MODALITIES = ("audio", "video", "audiovisual")
STREAMS = {
    "audio": ("audio",),
    "video": ("video",),
    "audiovisual": ("video", "audio"),
}
FRAME_RATES = (25, 50)  # frames a second at which the streams are fused
POOLINGS = ("cls", "mean")


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
        "openai/whisper-small", ("whisper",), normalized_audio=False, max_seconds=30
    ),
    "wavlm": EncoderChoice("microsoft/wavlm-base-plus", ("wavlm",)),
}
DEFAULT_ENCODERS = {"video": "resnet", "audio": "resnet1d"}  # auto_avsr's


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
        expected = " or ".join(model_types)
        return f"{flag} {name} is a checkpoint of {found}, one of {expected} is expected"
    return None
