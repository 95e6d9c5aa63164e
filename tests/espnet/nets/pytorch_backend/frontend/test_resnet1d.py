import pytest
import torch
from torch.nn import functional as F

from espnet.nets.pytorch_backend.frontend.resnet1d import Conv1dResNet, filter_bank


@pytest.fixture
def frontend():
    torch.manual_seed(0)
    return Conv1dResNet(width=4)


def waves(samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(samples), max(samples), 1, generator=generator)


def naive(frontend, wave):
    """One waveform, (S,), through plain one-dimensional layers."""
    trunk = frontend.trunk
    x = F.silu(trunk.bn1(F.conv1d(wave.view(1, 1, -1), trunk.conv1.weight, stride=4, padding=38)))
    for stage in (1, 2, 3, 4):
        for block in getattr(trunk, f"layer{stage}"):
            y = F.silu(block.bn1(block.conv1(x)))
            y = block.bn2(block.conv2(y))
            x = F.silu(y + (block.downsample(x) if block.downsample else x))
    return F.avg_pool1d(x, 20)[0].T


def test_agrees_with_the_layers_applied_one_by_one(frontend):
    frontend.eval()
    x = waves([6 * 640 + 639])
    features, lengths = frontend(x, torch.tensor([6 * 640 + 639]))
    assert features.shape == (1, 6, 32)
    assert lengths.tolist() == [6]
    torch.testing.assert_close(features[0], naive(frontend, x[0, : 6 * 640, 0]))


@pytest.mark.parametrize("width", [1, 4, 8, 16])
def test_gradients_are_finite(width):
    torch.manual_seed(0)
    frontend = Conv1dResNet(width=width)
    frontend(waves([1920, 1280]), torch.tensor([1920, 1280]))[0].square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in frontend.parameters())


def test_filters_peak_at_mel_spaced_frequencies():
    bank = filter_bank(16)
    spectrum = torch.fft.rfft(bank, n=16000).abs()  # a bin a hertz
    mel = 2595 * torch.log10(1 + spectrum.argmax(dim=1) / 700)
    low, high = (2595 * torch.log10(torch.tensor(1 + hertz / 700)) for hertz in (100, 7000))
    # The window of 5 ms blurs the lowest ones.
    torch.testing.assert_close(mel[3:], torch.linspace(low, high, 16)[3:], atol=15, rtol=0)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(16))
