"""Checkpoints with random weights in the shapes of published ones."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

from espnet.nets.pytorch_backend.frontend.clip_encoder import CLIPEncoder
from espnet.nets.pytorch_backend.frontend.pretrained_encoder import PretrainedEncoder
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder
from espnet.nets.pytorch_backend.frontend.wavlm_encoder import WavLMEncoder
from espnet.nets.pytorch_backend.frontend.whisper_encoder import WhisperEncoder
from espnet.utils.tiny_checkpoints import LLAMA3_ROPE, NORMALISATION

IMAGE_SIZE = 224  # pixels
SPREAD = 0.06  # standard deviation of random weights: texts then do not repeat one token
LLAMA_LAYERS = 16
TITLES = {
    "vit": "ViT-B/16",
    "clip": "CLIP ViT-B/16",
    "whisper": "Whisper small",
    "wavlm": "WavLM base plus",
}
ENCODER_CLASSES: dict[str, type[PretrainedEncoder]] = {
    "vit": ViTEncoder,
    "clip": CLIPEncoder,
    "whisper": WhisperEncoder,
    "wavlm": WavLMEncoder,
}
WHISPER_SMALL = {  # openai/whisper-small, but for layers and vocabulary
    "d_model": 768,
    "encoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_attention_heads": 12,
    "decoder_ffn_dim": 3072,
}


def published_encoder(name: str) -> PreTrainedModel:
    """Builds a model whose encoder has a published checkpoint's size.

    Parts that the front-end leaves out and that would take long to write are small or missing.
    """
    if name == "vit":  # google/vit-base-patch16-224-in21k
        return ViTModel(ViTConfig(image_size=IMAGE_SIZE, patch_size=16))
    if name == "clip":  # openai/clip-vit-base-patch16
        return CLIPVisionModel(CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=16))
    if name == "wavlm":  # microsoft/wavlm-base-plus
        return WavLMModel(WavLMConfig())
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = WhisperConfig(
        **WHISPER_SMALL, **tokens, encoder_layers=12, decoder_layers=1, decoder_start_token_id=2
    )
    return WhisperModel(config)


@contextmanager
def encoder_checkpoint(name: str) -> Iterator[str]:
    """Yields a folder with a checkpoint for a front-end, which is removed at the end."""
    torch.manual_seed(0)
    with saved(published_encoder(name)) as folder:
        if name in NORMALISATION:
            path = Path(folder) / "preprocessor_config.json"
            path.write_text(json.dumps(NORMALISATION[name]))
        yield folder


@contextmanager
def saved(model: PreTrainedModel) -> Iterator[str]:
    """Yields a folder with a model, which is removed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model  # A large one would take the host's memory as long as the folder is there.
        yield folder


@dataclass(frozen=True)
class Checkpoint:
    """A decoder's checkpoint to be, and the ids of the tokenizer that goes with it."""

    title: str  # its name in the table
    config: PreTrainedConfig  # shape of the model
    prompt: tuple[int, ...]  # ids that precede a text
    eos: int  # id of the end symbol
    memory_dim: int = 768  # size M of the encoder's output; for Whisper, that of the model


def whisper() -> Checkpoint:
    """Describes a Whisper in the shape of openai/whisper-small, but for its encoder."""
    end, start = 50257, 50258
    config = WhisperConfig(
        **WHISPER_SMALL,
        encoder_layers=1,
        decoder_layers=12,
        vocab_size=51865,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        begin_suppress_tokens=None,
        init_std=SPREAD,
    )
    # <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|>
    return Checkpoint(TITLES["whisper"], config, (start, 50259, 50359, 50363), end)


def llama(conditioning: str, layers: int = LLAMA_LAYERS) -> Checkpoint:
    """Describes a LLaMA in the shape of meta-llama/Llama-3.2-1B.

    With `cross-attention` the prompt is BOS, with `prefix` an instruction of some tokens follows.
    """
    config = _llama_config(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        rope_parameters=LLAMA3_ROPE,
        tie_word_embeddings=True,
        initializer_range=SPREAD,
    )
    instruction = tuple(range(1000, 1006)) if conditioning == "prefix" else ()
    title = f"Llama-3.2-1B with {layers} of {LLAMA_LAYERS} layers, {conditioning}"
    return Checkpoint(title, config, (config.bos_token_id, *instruction), config.eos_token_id)


def llama_8b() -> Checkpoint:
    """Describes a LLaMA in the shape of meta-llama/Llama-3.1-8B, with the prompt of a prefix."""
    smaller = llama("prefix")
    config = _llama_config(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        rope_parameters=LLAMA3_ROPE | {"factor": 8.0},
        tie_word_embeddings=False,
    )
    return Checkpoint("Llama-3.1-8B", config, smaller.prompt, smaller.eos)


def _llama_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128001,
        **options,
    )
