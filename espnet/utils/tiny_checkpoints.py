"""Makes tiny checkpoints with random weights, to try out every pretrained encoder offline.

`python -m espnet.utils.tiny_checkpoints FOLDER` leaves FOLDER/vit, FOLDER/clip, FOLDER/whisper
and FOLDER/wavlm, with the files that the published ones have. They have learned nothing.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

WIDTH = 64
TRANSFORMER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
}
IMAGES = {"image_size": 64, "patch_size": 16}  # pixels
NORMALISATION = {  # of the published checkpoints
    "vit": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "clip": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
}


def tiny_models() -> dict[str, PreTrainedModel]:
    """Builds the models, by the name of the encoder that loads them."""
    clip = CLIPConfig(
        vision_config={**TRANSFORMER, **IMAGES},
        text_config={**TRANSFORMER, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1},
    )
    whisper = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=2 * WIDTH,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=2 * WIDTH,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    wavlm = WavLMConfig(
        **TRANSFORMER,
        conv_dim=(WIDTH // 2,) * 7,
        num_conv_pos_embedding_groups=4,
    )
    return {
        "vit": ViTModel(ViTConfig(**TRANSFORMER, **IMAGES)),
        "clip": CLIPModel(clip),
        "whisper": WhisperForConditionalGeneration(whisper),
        "wavlm": WavLMModel(wavlm),
    }


def make_tiny_checkpoints(folder: str | Path, seed: int = 0) -> None:
    """Writes a checkpoint for each pretrained encoder.

    Args:
        folder: Where to make the folders of the checkpoints.
        seed: Of the random weights.
    """
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        for name, model in tiny_models().items():
            path = Path(folder) / name
            model.save_pretrained(path)
            if name in NORMALISATION:
                text = json.dumps(NORMALISATION[name], indent=2)
                (path / "preprocessor_config.json").write_text(text)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = ArgumentParser(description="Make tiny checkpoints with random weights.")
    parser.add_argument("folder", help="where to make them")
    folder = parser.parse_args(argv).folder
    make_tiny_checkpoints(folder)
    print(f"Made {', '.join(f'{folder}/{name}' for name in tiny_models())}: random weights")


if __name__ == "__main__":
    main()
