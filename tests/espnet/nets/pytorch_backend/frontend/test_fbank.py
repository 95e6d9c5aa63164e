import pytest
import torch
from torch.nn import functional as F

from espnet.nets.pytorch_backend.frontend.fbank import FLOOR, FilterBank
from espnet.nets.pytorch_backend.frontend.waveform import split_into_frames


@pytest.fixture
def frontend():
    torch.manual_seed(0)
    return FilterBank(width=2)


def waves(samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(samples), max(samples), 1, generator=generator)


def test_log_mel_agrees_with_torchaudio(frontend):
    torchaudio = pytest.importorskip("torchaudio")
    wave = waves([3200])[..., 0]
    theirs = torchaudio.transforms.MelSpectrogram(
        16000, 512, 400, 160, f_min=20.0, f_max=7600.0, n_mels=80, center=False
    )
    # torchaudio centres a window of 400 in 512 samples.
    expected = theirs(F.pad(wave, (120 + 56, 120 + 56)))
    frames, real = split_into_frames(wave.unsqueeze(-1), torch.tensor([3200]))
    log_mel = frontend.log_mel(frames.squeeze(-1), real).flatten(0, 1)[None]
    torch.testing.assert_close(
        log_mel, (expected + FLOOR).log().transpose(1, 2), atol=1e-4, rtol=1e-4
    )


def test_gradients_are_finite_and_silence_is_no_trouble(frontend):
    x = waves([1920, 1280])
    x[1] = 0
    frontend(x, torch.tensor([1920, 1280]))[0].square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in frontend.parameters())
