import json

import pytest
import torch
from safetensors.torch import load_file

from espnet.nets.encoders import AUDIO_ENCODERS, VISION_ENCODERS, folder_problem
from espnet.utils.tiny_checkpoints import main, make_tiny_checkpoints

PRETRAINED = {
    name: choice
    for name, choice in {**VISION_ENCODERS, **AUDIO_ENCODERS}.items()
    if choice.pretrained
}
PUBLISHED = {  # first value of image_mean and of image_std
    "vit": (0.5, 0.5),
    "clip": (0.48145466, 0.26862954),
}


def weights(folder, name):
    return load_file(folder / name / "model.safetensors")


def test_there_is_a_small_one_for_every_pretrained_encoder(tiny_checkpoints):
    for name, choice in PRETRAINED.items():
        folder = tiny_checkpoints / name
        assert folder_problem("--flag", str(folder), choice.model_types) is None
        assert (folder / "model.safetensors").stat().st_size < 2e6  # bytes
        assert all(weight.isfinite().all() for weight in weights(tiny_checkpoints, name).values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_are_normalised_as_by_the_published(tiny_checkpoints, name):
    config = json.loads((tiny_checkpoints / name / "preprocessor_config.json").read_text())
    assert (config["image_mean"][0], config["image_std"][0]) == PUBLISHED[name]
    assert len(config["image_mean"]) == len(config["image_std"]) == 3


def test_the_seed_makes_the_weights_and_no_other_random_number(tiny_checkpoints, tmp_path):
    state = torch.get_rng_state()
    make_tiny_checkpoints(tmp_path / "same")
    make_tiny_checkpoints(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name in [folder.name for folder in tiny_checkpoints.iterdir()]:
        first, same = weights(tiny_checkpoints, name), weights(tmp_path / "same", name)
        other = weights(tmp_path / "other", name)
        assert first.keys() == same.keys() == other.keys()
        assert all(torch.equal(weight, same[key]) for key, weight in first.items())
        assert not all(torch.equal(weight, other[key]) for key, weight in first.items())


def test_command_line(tmp_path, capsys):
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    for name in PRETRAINED:
        assert (tmp_path / name / "config.json").is_file()
        assert f"{tmp_path}/{name}" in printed
