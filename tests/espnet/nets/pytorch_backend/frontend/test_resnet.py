import pytest
import torch
from torch.nn import functional as F

from espnet.nets.pytorch_backend.frontend.resnet import Conv3dResNet


@pytest.fixture
def frontend():
    torch.manual_seed(0)
    return Conv3dResNet(width=4)


def clips(frames, size=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(frames), max(frames), 1, size, size, generator=generator)


def naive(frontend, clip):
    """One clip, (T, 1, H, W), through the front-end's layers as a textbook would do it."""
    x = clip.transpose(0, 1).unsqueeze(0)
    conv3d, norm, _, _ = frontend.frontend3D
    x = F.conv3d(x, conv3d.weight, stride=(1, 2, 2), padding=(2, 3, 3))
    x = F.silu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    x = F.max_pool2d(x[0].transpose(0, 1), 3, 2, 1)
    for stage in (1, 2, 3, 4):
        for block in getattr(frontend.trunk, f"layer{stage}"):
            y = F.silu(block.bn1(block.conv1(x)))
            y = block.bn2(block.conv2(y))
            x = F.silu(y + (block.downsample(x) if block.downsample else x))
    return x.flatten(2).mean(-1)


def test_agrees_with_the_layers_applied_one_by_one(frontend):
    frontend.eval()
    x = clips([7])
    features, lengths = frontend(x, torch.tensor([7]))
    assert features.shape == (1, 7, 32)
    assert frontend.output_dim == 32
    assert lengths.tolist() == [7]
    torch.testing.assert_close(features[0], naive(frontend, x[0]))


@pytest.mark.parametrize("width", [1, 8, 16])
@pytest.mark.parametrize("size", [24, 44, 88])
def test_gradients_are_finite_for_any_width_and_crop(width, size):
    """Among them the shapes at which a strided 1×1 convolution crashes in oneDNN."""
    torch.manual_seed(0)
    frontend = Conv3dResNet(width=width)
    frontend(clips([4, 3], size), torch.tensor([4, 3]))[0].square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in frontend.parameters())
