"""The demo and recipes: options that belong together, as defaults that the command line overrides.

docs/results.md has the figures of each, and the commands that print them. Nothing here imports
torch.
"""

from dataclasses import dataclass, field
from typing import Any

from espnet.formats import CLEAN_SNR
from espnet.nets.decoders import are_one
from espnet.nets.model_options import ModelOptions

DEMO_OPTIONS = {
    "exp_name": "demo",
    "root_dir": "demo_corpus",
    "train_file": "train.csv",
    "val_file": "val.csv",
    "test_file": "test.csv",
    "modality": "audiovisual",
    "modality_dropout": (0.4, 0.2),
    "audio_encoder": "fbank",
    "crop_size": 48,
    "video_width": 8,
    "audio_width": 16,
    "adim": 128,
    "aheads": 4,
    "eunits": 256,
    "elayers": 3,
    "dunits": 256,
    "dlayers": 1,
    "ctc_weight": 0.5,
    "lr": 2e-3,
    "max_frames": 360,
    "dropout_rate": 0.05,
    "max_epochs": 12,
    "average_epochs": 3,
    "warmup_epochs": 1,
    "num_workers": 1,
    "gpus": 1,
    "beam_size": 10,
    "ctc_decode_weight": 0.7,
    "decode_snr_target": [CLEAN_SNR, 10.0, 5.0, 0.0, -5.0],
}


@dataclass(frozen=True)
class Recipe:
    """Options that go together.

    Attributes:
        options: Values by name of the option.
        on_demo: More of them, on the demo corpus.
    """

    options: dict[str, Any]
    on_demo: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    # A Whisper learns a domain from few sentences. Adapters in its decoder would forget the
    # language of all others, so they are in the encoder only.
    "whisper": Recipe(
        {
            "audio_encoder": "whisper",
            "decoder": "whisper",
            "use_lora": True,
            "qlora_parts": ("audio",),
            "lr": 1e-3,
            "lr_pretrained": 5e-4,
            "max_frames": 600,
            "max_epochs": 2,
            "warmup_epochs": 0.2,
            "average_epochs": 1,
        },
        {
            "exp_name": "demo_whisper",
            "train_file": "train_240.csv",
            "beam_size": 5,
            "decode_snr_target": [CLEAN_SNR],
        },
    ),
    # A language model that reads a prefix. Aligned by CTC first, the prefix resembles the words,
    # and the language model listens from its first steps on; else it writes its own sentences.
    "llama": Recipe(
        {
            "audio_encoder": "whisper",
            "decoder": "llama",
            "llama_conditioning": "prefix",
            "llama_downsample": 2,
            "llama_prefix_ctc": True,
            "ctc_first_epochs": 2,
            "adim": None,
            "elayers": 0,
            "use_lora": True,
            "lr": 1e-3,
            "lr_pretrained": 1e-3,
            "max_frames": 800,
            "max_epochs": 3,
            "warmup_epochs": 0.2,
            "average_epochs": 1,
        },
        {
            "exp_name": "demo_llama",
            "gradient_checkpointing": False,
            "beam_size": 5,
            "decode_snr_target": [CLEAN_SNR],
        },
    ),
}


def recipe_options(name: str | None, *, demo: bool, qlora: bool) -> dict[str, Any]:
    """The options of a recipe.

    Args:
        name: Of `RECIPES`; None for no options.
        demo: Whether it is for the demo corpus.
        qlora: Whether adapters on 4 bits take the place of plain ones.

    Returns:
        Values by name of the option.
    """
    if name is None:
        return {}
    recipe = RECIPES[name]
    options = {**recipe.options, **(recipe.on_demo if demo else {})}
    if qlora:
        options.pop("use_lora", None)
    return options


def demo_options(given: ModelOptions) -> dict[str, Any]:
    """Defaults of the demo; encoders or a modality that were given take the place of its own.

    Args:
        given: Options of the command line.

    Returns:
        Values by name of the option.
    """
    options = dict(DEMO_OPTIONS)
    encoders = given.encoders.resolved()
    if encoders.modality:
        del options["modality"], options["audio_encoder"]
        if encoders.modality != "audiovisual":
            del options["modality_dropout"]
    if are_one(encoders, given.decoder):  # Its sizes are the checkpoint's.
        for name in ("adim", "aheads", "eunits", "elayers", "dunits", "dlayers"):
            del options[name]
    if not given.has_ctc_layer:  # Without a CTC layer, the search can give it no share either.
        del options["ctc_weight"], options["ctc_decode_weight"]
    return options
