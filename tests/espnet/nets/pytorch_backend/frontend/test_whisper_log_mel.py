import pytest
import torch
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor

from espnet.nets.pytorch_backend.frontend.whisper_log_mel import WhisperLogMel

SAMPLES = [1, 159, 160, 399, 401, 12345, 16000]  # The first four are shorter than a window.
GAINS = {"usual": 0.1, "quiet": 1e-5, "loud": 30.0, "silent": 0.0}


def noise(samples, gain=0.1, seed=0):
    return gain * torch.randn(1, samples, generator=torch.Generator().manual_seed(seed))


def theirs(wave, mels=80):
    """(1, S) -> (1, 3000, mels): transformers pads to 30 s."""
    extractor = WhisperFeatureExtractor(feature_size=mels)
    features = extractor(wave[0].numpy(), sampling_rate=16000, return_tensors="pt").input_features
    return features.transpose(1, 2)


def assert_same(features, expected):
    torch.testing.assert_close(features, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("mels", [80, 128])
def test_equals_transformers(mels, samples):
    wave = noise(samples)
    expected = theirs(wave, mels)
    log_mel = WhisperLogMel(mels)
    assert_same(log_mel(wave, 3000), expected)
    frames = -(-samples // 160)
    assert_same(log_mel(wave, frames), expected[:, :frames])


@pytest.mark.parametrize("gain", GAINS.values(), ids=GAINS)
def test_equals_transformers_whatever_the_level(gain):
    wave = noise(8001, gain)
    assert_same(WhisperLogMel()(wave, 52), theirs(wave)[:, :52])


def test_padding_changes_nothing():
    samples = [6000, 4321, 250]
    waves = [
        noise(length, gain, seed=length) for length, gain in zip(samples, (3, 1e-3, 1), strict=True)
    ]
    padded = torch.cat([F.pad(wave, (0, 6000 - wave.size(1))) for wave in waves])
    together = WhisperLogMel()(padded, 38)
    for row, wave in enumerate(waves):
        assert_same(together[row : row + 1], theirs(wave)[:, :38])


@pytest.mark.parametrize("frames", [10, 5])
def test_the_loudest_energy_counts_wherever_it_is(frames):
    """Of a click in the last sample, most energy is in windows centred beyond the waveform."""
    wave = noise(1600, 1e-6)
    wave[0, -1] = 1.0
    assert_same(WhisperLogMel()(wave, frames), theirs(wave)[:, :frames])


def test_of_30_seconds_only_the_last_window_differs():
    """It ends beyond the waveform, which transformers continues as in a mirror."""
    wave = noise(480_000)
    assert_same(WhisperLogMel()(wave, 3000)[:, :2999], theirs(wave)[:, :2999])


def test_features_keep_the_range_of_float32_in_autocast():
    wave = noise(3200, 1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = WhisperLogMel()(wave.bfloat16(), 20)
    assert features.dtype == torch.float32
    assert_same(features, theirs(wave.bfloat16().float())[:, :20])
