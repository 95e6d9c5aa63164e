"""Audio front-end: log-mel filter bank and two strided convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.formats import SAMPLES_PER_FRAME
from espnet.nets.pytorch_backend.frontend.interface import FrontendInterface
from espnet.nets.pytorch_backend.frontend.mel import mel_filters
from espnet.nets.pytorch_backend.frontend.waveform import split_into_frames
from espnet.nets.pytorch_backend.real_frames import RealFrames, batch_norm, convolve

WINDOW, HOP, FFT_SIZE = 400, 160, 512  # samples: 25 ms, 10 ms
MELS = 80
LOWEST_HZ, HIGHEST_HZ = 20.0, 7600.0
FLOOR = 1e-5  # added to energies before the logarithm; speech is normalised to unit variance


class FilterBank(FrontendInterface):
    """Log-mel energies, two convolutions that halve the rate, each with batch norm and swish.

    Far cheaper than a ResNet on the waveform, and quicker to learn from little data.

    Source: log-mel energies of 25 ms every 10 ms as in Kaldi; the convolutions take the place of
    the stacking of four frames in AV-HuBERT (Shi et al., ICLR 2022).

    Args:
        width: Features are 8 times as wide.
    """

    frame_rate = 25

    def __init__(self, *, width: int = 64) -> None:
        super().__init__()
        self.output_dim = 8 * width
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        filters = mel_filters(FFT_SIZE, MELS, LOWEST_HZ, HIGHEST_HZ)
        self.register_buffer("filters", filters, persistent=False)  # (FFT_SIZE / 2 + 1, MELS)
        self.norm = nn.BatchNorm1d(MELS)
        self.conv1 = nn.Conv1d(MELS, self.output_dim, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm1d(self.output_dim)
        self.conv2 = nn.Conv1d(self.output_dim, self.output_dim, 5, stride=2, padding=2, bias=False)
        self.norm2 = nn.BatchNorm1d(self.output_dim)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes waveforms, up to their last full frame. See `FrontendInterface`."""
        frames, real = split_into_frames(x, lengths)
        x = batch_norm(self.norm, self.log_mel(frames.squeeze(-1), real))
        for convolution, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            # A frame has too few steps to be convolved by itself, as in `Conv1dResNet`.
            x = convolve(convolution, real.pad(x).flatten(1, 2), padding=convolution.padding[0])
            x = real.pack(x.unflatten(1, (real.length, -1)))  # (B, T·P, D) -> (N, P, D)
            x = F.silu(batch_norm(norm, x))
        return real.pad(x.squeeze(1)), self.output_lengths(lengths)

    def log_mel(self, frames: Tensor, real: RealFrames) -> Tensor:
        """Log-mel energies, (N, 640) -> (N, 4, 80); windows are centred on their 10 ms."""
        margin = (WINDOW - HOP) // 2
        windows = real.extend(frames, margin, margin).unfold(1, WINDOW, HOP)  # (N, 4, 400)
        with torch.autocast(frames.device.type, enabled=False):  # Energies need float32's range.
            spectrum = torch.fft.rfft(windows.float() * self.window, n=FFT_SIZE)
            power = spectrum.real.square() + spectrum.imag.square()
            return (power @ self.filters.float() + FLOOR).log().to(frames.dtype)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of waveforms of given lengths in samples: one for each full 40 ms."""
        return lengths // SAMPLES_PER_FRAME
