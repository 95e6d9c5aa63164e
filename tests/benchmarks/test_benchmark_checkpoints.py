import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaForCausalLM,
    WhisperForConditionalGeneration,
)

from benchmarks import checkpoints
from benchmarks.common import CPU
from benchmarks.encoders import load_encoder


def number_of(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("name", "millions", "left_out"),
    [("vit", 86.4, ()), ("clip", 85.8, ()), ("whisper", 88.2, ("decoder",)), ("wavlm", 94.4, ())],
)
def test_encoders_have_the_size_of_the_published_ones(name, millions, left_out):
    with torch.device("meta"):
        model = checkpoints.published_encoder(name)
    used = [value for key, value in model.named_parameters() if not key.startswith(left_out)]
    assert round(number_of(used) / 1e6, 1) == millions


def test_decoders_have_the_size_of_the_published_ones():
    with torch.device("meta"):
        whisper = WhisperForConditionalGeneration(checkpoints.whisper().config)
        llama = LlamaForCausalLM(checkpoints.llama("prefix").config)
        larger = LlamaForCausalLM(checkpoints.llama_8b().config)
    # Of all of whisper-small, its encoder is left out.
    assert number_of(whisper.model.decoder.parameters()) == 241_734_912 - 88_154_112
    assert number_of(llama.parameters()) == 1_235_814_400
    assert number_of(larger.parameters()) == 8_030_261_248
    assert llama.config.rope_parameters["factor"] == 32
    assert larger.config.rope_parameters["factor"] == 8


def test_llama_8b_speaks_the_vocabulary_of_the_smaller_one():
    smaller, larger = checkpoints.llama("prefix"), checkpoints.llama_8b()
    assert (larger.prompt, larger.eos) == (smaller.prompt, smaller.eos)
    assert larger.config.vocab_size == smaller.config.vocab_size


@pytest.mark.parametrize("name", checkpoints.ENCODER_CLASSES)
def test_a_checkpoint_loads_and_is_removed(name, tiny_checkpoints, monkeypatch, caplog):
    config = AutoConfig.from_pretrained(tiny_checkpoints / name)
    if name == "clip":
        config = config.vision_config
    monkeypatch.setattr(checkpoints, "published_encoder", lambda _: AutoModel.from_config(config))
    with checkpoints.encoder_checkpoint(name) as folder:
        encoder = load_encoder(name, folder, CPU)
    assert encoder.output_dim == 64
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not caplog.records  # such as that the normalisation of images is not known
    with pytest.raises(ValueError, match="is no folder"):
        load_encoder(name, folder, CPU)
