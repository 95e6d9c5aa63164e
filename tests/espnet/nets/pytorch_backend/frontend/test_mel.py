import numpy as np
import pytest
import torch

from espnet.nets.pytorch_backend.frontend.mel import mel_filters

BANKS = {
    "fbank": (512, 80, 20.0, 7600.0, "htk", False),
    "whisper": (400, 80, 0.0, 8000.0, "slaney", True),
    "whisper-large": (400, 128, 0.0, 8000.0, "slaney", True),
}


def hertz_to_mel(hertz, scale):
    """By the formulas of HTK's and of Slaney's manual."""
    if scale == "htk":
        return 2595 * np.log10(1 + hertz / 700)
    linear = 3 * hertz / 200
    return np.where(
        hertz < 1000, linear, 15 + 27 * np.log(np.maximum(hertz, 1) / 1000) / np.log(6.4)
    )


@pytest.fixture(params=BANKS.values(), ids=BANKS)
def bank(request):
    return request.param


def filters_of(bank):
    fft_size, mels, lowest, highest, scale, normalised = bank
    return mel_filters(fft_size, mels, lowest, highest, scale=scale, normalised=normalised)


def test_filters_agree_with_torchaudio(bank):
    torchaudio = pytest.importorskip("torchaudio")
    fft_size, mels, lowest, highest, scale, normalised = bank
    norm = "slaney" if normalised else None
    expected = torchaudio.functional.melscale_fbanks(
        fft_size // 2 + 1, lowest, highest, mels, 16000, norm, scale
    )
    filters = filters_of(bank)
    assert filters.dtype == torch.float32
    torch.testing.assert_close(filters, expected)


def test_filters_are_triangles_between_evenly_spaced_mels(bank):
    """As numpy interpolates them."""
    fft_size, mels, lowest, highest, scale, normalised = bank
    fine = np.linspace(0, 8000, 800_001)
    evenly = np.linspace(*hertz_to_mel(np.array([lowest, highest]), scale), mels + 2)
    corners = np.interp(evenly, hertz_to_mel(fine, scale), fine)
    bins = np.linspace(0, 8000, fft_size // 2 + 1)
    for mel in range(mels):
        left, middle, right = corners[mel : mel + 3]
        height = 2 / (right - left) if normalised else 1.0
        expected = np.interp(bins, [left, middle, right], [0, height, 0])
        np.testing.assert_allclose(filters_of(bank)[:, mel], expected, atol=2e-5 * height)
