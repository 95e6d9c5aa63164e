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


def test_padding_and_odd_samples_change_nothing(frontend):
    frontend.eval()
    samples = [7 * 640 + 13, 4 * 640, 2 * 640 + 639]
    x = waves(samples)
    together, lengths = frontend(x, torch.tensor(samples))
    assert together.shape == (3, 7, 16)
    assert lengths.tolist() == [7, 4, 2]
    for row, length in enumerate(samples):
        alone, frames = frontend(x[row : row + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(together[row, : frames[0]], alone[0], atol=1e-5, rtol=1e-4)
        assert not together[row, frames[0] :].any()


def test_padding_enters_no_batch_statistics(frontend):
    samples = torch.tensor([3 * 640, 2 * 640])
    x = waves(samples.tolist())
    frontend.train()
    start = {name: value.clone() for name, value in frontend.state_dict().items()}
    expected, _ = frontend(x, samples)
    statistics = {name: value.clone() for name, value in frontend.named_buffers()}
    frontend.load_state_dict(start)
    features, _ = frontend(F.pad(x, (0, 0, 0, 5 * 640), value=9.0), samples)
    torch.testing.assert_close(features[:, :3], expected, atol=1e-5, rtol=1e-4)
    for name, value in frontend.named_buffers():
        torch.testing.assert_close(value, statistics[name])


def test_gradients_are_finite_and_silence_is_no_trouble(frontend):
    x = waves([1920, 1280])
    x[1] = 0
    frontend(x, torch.tensor([1920, 1280]))[0].square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in frontend.parameters())
