"""Triangular filters of mel bands."""

from typing import Literal

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from espnet.formats import AUDIO_RATE


def mel_filters(
    fft_size: int,
    mels: int,
    lowest_hz: float,
    highest_hz: float,
    *,
    scale: Literal["htk", "slaney"] = "htk",
    normalised: bool = False,
) -> Tensor:
    """Filters that turn the energies of a spectrum into those of mel bands.

    Args:
        fft_size: Samples that are transformed.
        mels: Number of bands.
        lowest_hz: Where the first band begins.
        highest_hz: Where the last band ends.
        scale: What mel is.
        normalised: Filters have the same area; otherwise the same height, 1.

    Returns:
        Filters, (fft_size / 2 + 1, mels), float32.
    """
    filters = mel_filter_bank(
        num_frequency_bins=fft_size // 2 + 1,
        num_mel_filters=mels,
        min_frequency=lowest_hz,
        max_frequency=highest_hz,
        sampling_rate=AUDIO_RATE,
        norm="slaney" if normalised else None,
        mel_scale=scale,
    )
    return torch.from_numpy(filters).float()
