import logging
import shutil

import pytest
import torch
from transformers import CLIPModel, CLIPVisionModel

from espnet.nets.pytorch_backend.frontend.clip_encoder import CLIPEncoder

FRAMES = [4, 1, 2]
# From the preprocessor_config.json of openai/clip-vit-base-patch16.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def videos(frames, size=48, seed=0):
    """(B, T, 1, H, W); padding is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(frames), max(frames), 1, size, size, generator=generator)


@pytest.fixture
def folder(tiny_checkpoints):
    return str(tiny_checkpoints / "clip")


def theirs(folder, images, pooling="cls"):
    """(N, 3, H, W) -> (N, D)."""
    model = CLIPModel.from_pretrained(folder).vision_model.eval()
    out = model(images, interpolate_pos_encoding=True)
    if pooling == "cls":
        return out.pooler_output
    return model.post_layernorm(out.last_hidden_state[:, 1:]).mean(dim=1)


@pytest.mark.parametrize("size", [48, 88])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("chunk_frames", [1, 3, 128])
@torch.no_grad()
def test_equals_transformers(folder, pooling, chunk_frames, size):
    encoder = CLIPEncoder(folder, pooling=pooling, chunk_frames=chunk_frames).eval()
    x = videos(FRAMES, size)
    together, _ = encoder(x, torch.tensor(FRAMES))
    for row, length in enumerate(FRAMES):
        images = encoder.images(x[row, :length])
        assert images.shape[1:] == ((3, 48, 48) if size == 48 else (3, 96, 96))
        expected = theirs(folder, images, pooling)
        torch.testing.assert_close(together[row, :length], expected)


@torch.no_grad()
def test_the_own_size_of_the_checkpoint_needs_no_interpolation(folder):
    encoder = CLIPEncoder(folder, image_size=64).eval()
    x = videos([2], 88)
    model = CLIPModel.from_pretrained(folder).vision_model.eval()
    expected = model(encoder.images(x[0])).pooler_output
    torch.testing.assert_close(encoder(x, torch.tensor([2]))[0][0], expected)


@pytest.mark.parametrize("statistics", [True, False])
def test_images_are_normalised_as_in_pretraining(folder, tmp_path, caplog, statistics):
    own_folder = shutil.copytree(folder, tmp_path / "clip")
    if not statistics:
        (own_folder / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        encoder = CLIPEncoder(str(own_folder))
    assert len(caplog.records) == (0 if statistics else 1)
    assert statistics or "does not say by what its images are normalised" in caplog.text
    pixels = torch.rand(2, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    images = encoder.images((pixels - 0.421) / 0.165)
    torch.testing.assert_close(images, (pixels.expand(2, 3, 48, 48) - MEAN) / STD)


@torch.no_grad()
def test_loads_from_a_whole_clip_and_from_its_vision_model(folder, tmp_path):
    whole = CLIPModel.from_pretrained(folder).vision_model
    shutil.copy(f"{folder}/preprocessor_config.json", tmp_path)
    CLIPVisionModel.from_pretrained(folder).save_pretrained(tmp_path)
    for name in (folder, str(tmp_path)):
        weights = CLIPEncoder(name).backbone.state_dict()
        expected = whole.state_dict()
        assert weights.keys() == expected.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], atol=0, rtol=0)
