import json
import logging
import shutil

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder

FRAMES = [5, 1, 3]


def videos(frames, size=48, seed=0):
    """(B, T, 1, H, W); padding is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(frames), max(frames), 1, size, size, generator=generator)


@pytest.fixture
def folder(tiny_checkpoints):
    return str(tiny_checkpoints / "vit")


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "vit")


def theirs(folder, images, pooling="cls"):
    """(N, 3, H, W) -> (N, D)."""
    model = ViTModel.from_pretrained(folder).eval()
    tokens = model(images, interpolate_pos_encoding=True).last_hidden_state
    return tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(dim=1)


def interpolation(source, target):
    """Weights (target, source) of linear interpolation that smooths before it shrinks."""
    scale = source / target
    centres = (torch.arange(target) + 0.5) * scale
    distances = (torch.arange(source) + 0.5 - centres[:, None]).abs() / max(scale, 1.0)
    weights = (1 - distances).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("chunk_frames", [1, 4, 128])
@torch.no_grad()
def test_equals_transformers(folder, pooling, chunk_frames):
    encoder = ViTEncoder(folder, pooling=pooling, chunk_frames=chunk_frames).eval()
    x = videos(FRAMES)
    together, _ = encoder(x, torch.tensor(FRAMES))
    for row, length in enumerate(FRAMES):
        expected = theirs(folder, encoder.images(x[row, :length]), pooling)
        torch.testing.assert_close(together[row, :length], expected)


@pytest.mark.parametrize(
    ("crop", "image_size", "side"),
    [(88, None, 96), (48, None, 48), (88, 64, 64), (64, 64, 64), (48, 64, 64)],
)
@torch.no_grad()
def test_images_are_resized_and_normalised_as_in_pretraining(own_folder, crop, image_size, side):
    mean, std = torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.2, 0.4, 0.7])
    statistics = {"image_mean": mean.tolist(), "image_std": std.tolist()}
    (own_folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    encoder = ViTEncoder(str(own_folder), image_size=image_size).eval()
    pixels = torch.rand(2, 1, crop, crop, generator=torch.Generator().manual_seed(0))
    images = encoder.images((pixels - 0.421) / 0.165)
    weights = interpolation(crop, side)
    grey = (weights @ pixels @ weights.T).expand(2, 3, side, side)
    torch.testing.assert_close(images, (grey - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    features, _ = encoder(((pixels - 0.421) / 0.165)[None], torch.tensor([2]))
    torch.testing.assert_close(features[0], theirs(own_folder, images))


@torch.no_grad()
def test_the_own_size_of_the_checkpoint_needs_no_interpolation(folder):
    encoder = ViTEncoder(folder, image_size=64).eval()
    x = videos([2], 88)
    model = ViTModel.from_pretrained(folder).eval()
    expected = model(encoder.images(x[0])).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder(x, torch.tensor([2]))[0][0], expected)


@pytest.mark.parametrize("frames", [FRAMES, [2, 2]])
@torch.no_grad()
def test_the_backbone_sees_each_real_frame_once(folder, frames):
    encoder = ViTEncoder(folder, chunk_frames=4).eval()
    seen = []
    encoder.backbone.embeddings.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    encoder(videos(frames), torch.tensor(frames))
    assert sum(seen) == sum(frames)
    assert max(seen) <= 4


@pytest.mark.parametrize("saved_as", [ViTModel, ViTForImageClassification])
def test_loads_without_the_head_of_the_checkpoint(folder, tmp_path, saved_as):
    saved = saved_as(ViTConfig.from_pretrained(folder))
    saved.save_pretrained(tmp_path)
    expected = saved.base_model.state_dict()
    weights = ViTEncoder(str(tmp_path)).backbone.state_dict()
    assert weights.keys() == {name for name in expected if not name.startswith("pooler.")}
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=0, rtol=0)


@pytest.mark.parametrize("missing", ["file", "values"])
@torch.no_grad()
def test_without_statistics_the_published_ones_are_taken(own_folder, caplog, missing):
    file = own_folder / "preprocessor_config.json"
    file.unlink() if missing == "file" else file.write_text('{"do_resize": true}')
    with caplog.at_level(logging.WARNING):
        encoder = ViTEncoder(str(own_folder))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = caplog.records[0].getMessage()
    assert f"{own_folder} does not say by what its images are normalised" in message
    assert "mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5]" in message
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 48, 48)
    images = encoder.images((x - 0.421) / 0.165)
    torch.testing.assert_close(images, (2 * x - 1).expand(2, 3, 48, 48))


def test_statistics_are_no_part_of_the_state_dict(folder, caplog):
    encoder = ViTEncoder(folder)
    assert not caplog.records
    assert all(name.startswith("backbone.") for name in encoder.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 88}, r"--vision-image-size 88 is no multiple of the patch size 16"),
        ({"pooling": "max"}, r"pooling 'max' is unknown: choose cls or mean"),
    ],
)
def test_what_does_not_fit_is_an_error(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ViTEncoder(folder, **options)
