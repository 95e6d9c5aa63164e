import json
import logging
import shutil

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ViTModel
from transformers.utils import logging as transformers_logging

from espnet.nets.encoders import VISION_ENCODERS
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder
from espnet.nets.pytorch_backend.pretrained import load_pretrained

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
