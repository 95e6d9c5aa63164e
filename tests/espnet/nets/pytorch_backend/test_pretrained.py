import gc
import inspect
import json
import logging
import shutil

import bitsandbytes
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    ViTModel,
    WavLMModel,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder
from transformers.utils import logging as transformers_logging

from espnet.nets.encoders import VISION_ENCODERS
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder
from espnet.nets.pytorch_backend.pretrained import (
    bases,
    cache_argument,
    from_bases,
    load_pretrained,
)
from espnet.nets.pytorch_backend.qlora_utils import add_lora, merge_lora, quantize_4bit
from tests.adapted_cases import other_values

REMEDY = "give --flag the folder or hub id of a vit checkpoint"


def load(name):
    return load_pretrained(
        ViTModel,
        str(name),
        VISION_ENCODERS["vit"].model_types,
        flag="--flag",
        add_pooling_layer=False,
    )


def problem(name):
    """The error that the name gives: one line, which says what was asked for by which flag."""
    with pytest.raises(ValueError, match=r"^--flag ") as raised:
        load(name)
    message = str(raised.value)
    assert message.startswith(f"--flag {name} ")
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tiny_checkpoints, tmp_path):
    """A checkpoint that a test may spoil."""
    return shutil.copytree(tiny_checkpoints / "vit", tmp_path / "vit")


@pytest.fixture
def offline_cache(monkeypatch, tmp_path):
    """Empty cache of a hub that cannot be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def put_into_cache(cache, name, folder):
    """As if the checkpoint in a folder had been fetched from the hub."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_weights_are_those_of_the_checkpoint_in_float32(folder):
    expected = load_file(folder / "model.safetensors")
    model = load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    cls_token = expected["embeddings.cls_token"]
    torch.testing.assert_close(model.embeddings.cls_token.data, cls_token, atol=0, rtol=0)
    ViTModel.from_pretrained(folder).half().save_pretrained(folder)
    model = load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rounded = cls_token.half().float()
    torch.testing.assert_close(model.embeddings.cls_token.data, rounded, atol=0, rtol=0)


def test_loading_logs_nothing_and_leaves_the_log_level(folder, caplog):
    """Though the checkpoint has a pooler that is left out."""
    before = transformers_logging.get_verbosity()
    assert before != transformers_logging.ERROR
    with caplog.at_level(logging.DEBUG):
        load(folder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert transformers_logging.get_verbosity() == before
    (folder / "model.safetensors").unlink()
    problem(folder)
    assert transformers_logging.get_verbosity() == before


@pytest.mark.parametrize("content", [None, "{", "[]", "[1]", '"vit"'])
def test_a_folder_needs_a_readable_config(folder, content):
    config = folder / "config.json"
    config.unlink() if content is None else config.write_text(content)
    assert "holds no readable config.json: give a folder of save_pretrained" in problem(folder)


def test_a_path_must_be_a_folder(folder):
    for path in (folder / "none", folder / "config.json", "./none", "~/none", "a/b/c"):
        assert "is no folder: give a folder with config.json and weights" in problem(path)


def test_another_architecture_is_an_error(tiny_checkpoints, folder):
    message = "is a checkpoint of clip, one of vit is expected"
    assert message in problem(tiny_checkpoints / "clip")
    with pytest.raises(ValueError, match=f"^--vision-encoder-name .*/clip {message}"):
        ViTEncoder(str(tiny_checkpoints / "clip"))
    (folder / "config.json").write_text("{}")
    assert "is a checkpoint of None, one of vit is expected" in problem(folder)


def test_missing_weights_are_named(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {key: weight for key, weight in weights.items() if "layer.1" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    message = problem(folder)
    assert "lacks 16 weights of ViTModel, such as layers.1.attention" in message
    assert message.endswith(REMEDY)
    kept = {key: weight for key, weight in weights.items() if key != "layernorm.bias"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of ViTModel, such as layernorm.bias: " in problem(folder)


def test_a_folder_needs_weights(folder):
    (folder / "model.safetensors").unlink()
    message = problem(folder)
    assert "cannot be loaded (Error no file named model.safetensors" in message
    assert message.endswith(REMEDY)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n" * 3])
def test_weights_must_be_readable(folder, content):
    """An interrupted copy, or what git leaves without its extension for large files."""
    (folder / "model.safetensors").write_bytes(content)
    message = problem(folder)
    assert "cannot be loaded (" in message
    assert message.endswith(REMEDY)


@pytest.mark.parametrize(
    ("hidden_size", "message"),
    [(32, "has weights that do not fit its config.json"), ("wide", "cannot be loaded (")],
)
def test_weights_must_fit_the_config(folder, hidden_size, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": hidden_size}))
    assert message in problem(folder)


@pytest.mark.usefixtures("offline_cache")
@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_an_unknown_name_without_a_network(name):
    message = problem(name)
    assert "is neither a folder here nor in the cache, and the Hugging Face hub cannot" in message
    assert message.endswith(REMEDY)


def test_the_cache_serves_without_a_network(offline_cache, tiny_checkpoints, folder):
    put_into_cache(offline_cache, "someone/vit", folder)
    cls_token = load_file(folder / "model.safetensors")["embeddings.cls_token"]
    model = load("someone/vit")
    torch.testing.assert_close(model.embeddings.cls_token.data, cls_token, atol=0, rtol=0)
    put_into_cache(offline_cache, "someone/clip", tiny_checkpoints / "clip")
    message = problem("someone/clip")
    assert "is a checkpoint of clip, one of vit is expected" in message
    assert message.endswith(REMEDY)


@pytest.mark.parametrize("config", ['{"model_type": "newer"}', "{}"])
def test_a_checkpoint_on_the_hub_that_transformers_does_not_know(offline_cache, folder, config):
    (folder / "config.json").write_text(config)
    put_into_cache(offline_cache, "someone/else", folder)
    assert problem("someone/else").endswith(REMEDY)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (GatedRepoError, "on the Hugging Face hub asks for a licence and a login"),
        (RepositoryNotFoundError, "is neither a folder here nor a checkpoint on the Hugging Face"),
    ],
)
def test_what_the_hub_answers(monkeypatch, cause, message):
    def refuse(*_, **__):
        # As transformers does: its own text has many lines.
        raise OSError("There is no such thing.\nOr is there?") from cause.__new__(cause)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    found = problem("someone/private")
    assert message in found
    assert found.endswith(REMEDY)


BACKBONES = {  # class, options, and the class of the whole checkpoint
    "vit": (ViTModel, {"add_pooling_layer": False}, ViTModel),
    "clip": (CLIPVisionModel, {}, CLIPModel),
    "whisper": (
        WhisperEncoder,
        {"key_mapping": {r"^(model\.)?encoder\.": ""}},
        WhisperForConditionalGeneration,
    ),
    "wavlm": (WavLMModel, {}, WavLMModel),
    "whisper-decoder": (WhisperForCausalLM, {}, WhisperForConditionalGeneration),
    "llama": (LlamaForCausalLM, {}, LlamaForCausalLM),
}
every_backbone = pytest.mark.parametrize("kind", BACKBONES)


def load_kind(kind, root, **more):
    model_class, options, _ = BACKBONES[kind]
    name = kind.removesuffix("-decoder")
    return load_pretrained(model_class, str(root / name), (name,), flag="--flag", **options, **more)


def bits(model):
    """The 4-bit weights' names in the state dict, and those of their tables."""
    weights = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, bitsandbytes.nn.Linear4bit)
    }
    return weights, {
        n for n in model.state_dict() if n.rpartition(".weight.")[0] + ".weight" in weights
    }


@every_backbone
def test_quantised_while_loading_is_what_quantising_afterwards_gives(tiny_checkpoints, kind):
    model, expected = (
        load_kind(kind, tiny_checkpoints, quantize=True),
        load_kind(kind, tiny_checkpoints),
    )
    left_alone = quantize_4bit(expected)
    linear = {n for n, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    weights, tables = bits(model)
    assert weights == {f"{name}.weight" for name in linear - set(left_alone)}
    assert len(tables) == 5 * len(weights)  # scales and codes on two levels, and their type
    one, two = model.state_dict(), expected.state_dict()
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    kinds = [[type(part).__name__ for part in each.modules()] for each in (model, expected)]
    assert kinds[0] == kinds[1]
    assert not any(part.training for part in model.modules())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in expected.named_parameters() if not p.requires_grad}
    merge_lora(model)  # Back to full precision, as it is on the whole.
    merge_lora(expected)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


@every_backbone
def test_codes_do_not_depend_on_the_precision_of_the_rest(tiny_checkpoints, kind):
    half = load_kind(kind, tiny_checkpoints, quantize=True, dtype=torch.bfloat16)
    full = load_kind(kind, tiny_checkpoints, quantize=True)
    weights, tables = bits(half)
    one, two = half.state_dict(), full.state_dict()
    assert list(one) == list(two)
    for name in one:
        if name.endswith("bitsandbytes__nf4"):  # which tells the precision after merging
            continue
        expected = two[name]
        if name not in weights | tables and expected.is_floating_point():
            expected = expected.bfloat16()
        torch.testing.assert_close(one[name], expected, rtol=0, atol=0)
    merge_lora(half)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_weights_in_full_precision_do_not_pile_up_while_loading(tiny_checkpoints, monkeypatch):
    layers = LlamaForCausalLM.from_pretrained(tiny_checkpoints / "llama").model.named_modules()
    shapes = [layer.weight.shape for _, layer in layers if isinstance(layer, nn.Linear)]
    quantise = bitsandbytes.functional.quantize_4bit
    alive = []

    def watch(weight, *arguments, **options):
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        full = [t for t in tensors if t.dtype == torch.float32 and not t.is_meta]
        alive.append({t.data_ptr() for t in full if t.shape in shapes})
        assert weight.data_ptr() in alive[-1]
        return quantise(weight, *arguments, **options)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", watch)
    gc.collect()
    gc.freeze()  # What there was before is not looked at.
    try:
        load_kind("llama", tiny_checkpoints, quantize=True)
    finally:
        gc.unfreeze()
    assert len(alive) == len(shapes) + 1  # One is quantised on trial.
    assert max(map(len, alive)) <= 2


@every_backbone
def test_the_fingerprint_tells_checkpoints_apart_and_nothing_else(tiny_checkpoints, tmp_path, kind):
    name = kind.removesuffix("-decoder")
    base = load_kind(kind, tiny_checkpoints).base
    assert base.name == str(tiny_checkpoints / name)
    assert len(base.fingerprint) == 16
    for options in ({"dtype": torch.bfloat16}, {"quantize": True}):
        assert load_kind(kind, tiny_checkpoints, **options).base == base
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        whole = BACKBONES[kind][2].from_pretrained(tiny_checkpoints / name, dtype=dtype)
        whole.save_pretrained(tmp_path / str(number) / name)
        again = load_kind(kind, tmp_path / str(number)).base
        assert again.name != base.name
        assert again.fingerprint == base.fingerprint
    other_values(tiny_checkpoints / name, tmp_path / "values" / name)
    assert load_kind(kind, tmp_path / "values").base.fingerprint != base.fingerprint
    config = AutoConfig.from_pretrained(tiny_checkpoints / name)
    sizes = config.vision_config if kind == "clip" else config
    for field in ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"):
        if hasattr(sizes, field):
            setattr(sizes, field, 192)
    BACKBONES[kind][2](config).save_pretrained(tmp_path / "size" / name)
    assert load_kind(kind, tmp_path / "size").base.fingerprint != base.fingerprint


def test_bases_and_what_they_bring_back(tiny_checkpoints):
    assert bases(nn.Linear(2, 2)) == {}
    assert from_bases(nn.Linear(2, 2)) == set()
    model = nn.ModuleDict({"part": nn.ModuleDict({"new": nn.Linear(64, 2)})})
    model["part"]["backbone"] = load_kind("clip", tiny_checkpoints, quantize=True)
    backbone = model["part"]["backbone"]
    assert bases(model) == {"part.backbone": backbone.base}
    backbone.requires_grad_(False)
    state = set(model.state_dict())
    new = {"part.new.weight", "part.new.bias"}
    assert from_bases(model) == state - new
    add_lora(backbone, rank=2, targets=["layers.1.self_attn.q_proj"])
    backbone.post_layernorm.requires_grad_(True)
    trained = {f"part.backbone.post_layernorm.{kind}" for kind in ("weight", "bias")}
    prefix = "part.backbone.encoder.layers.1.self_attn.q_proj.lora_"
    trained |= {f"{prefix}{side}.default.weight" for side in "AB"}
    assert set(model.state_dict()) - from_bases(model) == new | trained
    assert prefix.replace("lora_", "base_layer.weight.absmax") in from_bases(model)


def test_the_checkpoint_loads_once_more_in_full_precision(tiny_checkpoints):
    model = load_kind("whisper", tiny_checkpoints, quantize=True, dtype=torch.bfloat16)
    del model.layers[1:]
    whole, expected = model.load_plain(), load_kind("whisper", tiny_checkpoints)
    assert whole.base == expected.base == model.base
    assert type(whole) is type(expected)
    assert whole.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value, rtol=0, atol=0)


def test_errors_are_the_same_for_a_checkpoint_that_is_quantised(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {key: weight for key, weight in weights.items() if "layer.1" not in key}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^--flag .* lacks 16 weights of ViTModel, such as lay"):
        load_kind("vit", folder.parent, quantize=True)


@pytest.mark.parametrize("layer", [LlamaDecoderLayer, WhisperAttention])
def test_cache_argument_is_one_that_the_layer_has(layer):
    assert cache_argument(layer) in inspect.signature(layer.forward).parameters


def test_cache_argument_of_older_layers():
    class Older(nn.Module):
        def forward(self, x, past_key_values=None):
            return x, past_key_values

    assert cache_argument(Older) == "past_key_values"
