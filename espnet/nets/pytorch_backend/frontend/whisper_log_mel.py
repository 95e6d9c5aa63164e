"""Whisper's log-mel features, computed by torch on the model's device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.formats import AUDIO_RATE
from espnet.nets.pytorch_backend.frontend.mel import mel_filters

FFT_SIZE = 400  # samples, 25 ms, which is the window too
HOP = 160  # samples, 10 ms
FLOOR = 1e-10  # of energies
RANGE = 8.0  # powers of ten below an utterance's loudest energy that are told apart


class WhisperLogMel(nn.Module):
    """Log-mel energies on a hundred frames a second, scaled by the utterance's loudest.

    Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, 2023;
    equal to transformers' `WhisperFeatureExtractor`, which works in numpy.

    Args:
        mels: Number of bands: 80, or 128 from large-v3 on.
    """

    def __init__(self, mels: int = 80) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(FFT_SIZE), persistent=False)
        filters = mel_filters(FFT_SIZE, mels, 0.0, AUDIO_RATE / 2, scale="slaney", normalised=True)
        self.register_buffer("filters", filters, persistent=False)  # (FFT_SIZE / 2 + 1, mels)

    def forward(self, waves: Tensor, frames: int) -> Tensor:
        """Computes the features.

        Args:
            waves: Waveforms in [-1, 1], (B, S), zero where padded.
            frames: Number of features F; beyond the waveform they are those of silence.

        Returns:
            Features, (B, F, mels).
        """
        with torch.autocast(waves.device.type, enabled=False):  # Energies need float32's range.
            waves = waves.float()
            # A waveform's end may be in windows that are centred beyond it: none must be missed
            # when the loudest energy is sought.
            windows = max(frames, -(-waves.size(1) // HOP) + FFT_SIZE // HOP)
            waves = F.pad(waves, (0, windows * HOP - waves.size(1)))
            spectrum = torch.stft(
                waves,
                FFT_SIZE,
                HOP,
                window=self.window.float(),
                center=True,
                pad_mode="reflect",
                return_complex=True,
            )
            power = spectrum.real.square() + spectrum.imag.square()  # (B, FFT_SIZE / 2 + 1, F')
            energies = (power.transpose(1, 2) @ self.filters.float()).clamp(min=FLOOR).log10()
            loudest = energies.amax(dim=(1, 2), keepdim=True)
            return (torch.maximum(energies, loudest - RANGE)[:, :frames] + 4.0) / 4.0
