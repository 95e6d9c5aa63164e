"""Audio front-end: a one-dimensional ResNet-18 on the waveform."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.formats import AUDIO_RATE, SAMPLES_PER_FRAME
from espnet.nets.pytorch_backend.frontend.interface import FrontendInterface
from espnet.nets.pytorch_backend.frontend.waveform import split_into_frames
from espnet.nets.pytorch_backend.real_frames import RealFrames, batch_norm, convolve

LOWEST_HZ, HIGHEST_HZ = 100, 7000  # centres of the first convolution's filters at the start
KERNEL = 80  # samples that the first convolution sees, 5 ms
FIRST_STRIDE = 4
MARGIN = (KERNEL - FIRST_STRIDE) // 2  # samples that it sees to each side of its stride


def filter_bank(filters: int) -> Tensor:
    """Band-pass filters whose centres are evenly spaced on the mel scale.

    The first convolution starts from these, which learns faster than random weights do.

    Args:
        filters: Number of filters.

    Returns:
        Impulse responses of unit norm, (filters, 80).
    """
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (LOWEST_HZ, HIGHEST_HZ))
    mel = low + torch.arange(filters) * ((high - low) / max(1, filters - 1))
    centres = 700 * (10 ** (mel / 2595) - 1)
    seconds = (torch.arange(KERNEL) - (KERNEL - 1) / 2) / AUDIO_RATE
    # The phases differ, so that neighbours with overlapping bands are not alike.
    phases = torch.arange(filters) * (math.pi / 2)
    waves = torch.cos(2 * math.pi * centres[:, None] * seconds + phases[:, None])
    filters_in_time = waves * torch.hann_window(KERNEL, periodic=False)
    return filters_in_time / filters_in_time.norm(dim=1, keepdim=True)


class BasicBlock1D(nn.Module):
    """Two convolutions over three steps with batch norm and swish around a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Factor by which the length shrinks.
    """

    def __init__(self, *, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv1d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(channels)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv1d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm1d(channels),
            )

    def forward(self, x: Tensor, real: RealFrames) -> Tensor:
        """Applies the block.

        Args:
            x: Steps of real frames, (N, P, C).
            real: Where these frames are.

        Returns:
            Steps, (N, P / stride, C').
        """
        shortcut = x
        if self.downsample is not None:
            convolution, norm = self.downsample
            shortcut = batch_norm(norm, convolve(convolution, x))
        # With a stride of two, the last step of a frame sees none of the next frame.
        x = convolve(self.conv1, real.extend(x, 1, 2 - self.stride))
        x = F.silu(batch_norm(self.bn1, x))
        x = batch_norm(self.bn2, convolve(self.conv2, real.extend(x, 1, 1)))
        return F.silu(x + shortcut)


class ResNet1D(nn.Module):
    """A convolution over 5 ms, the four stages of a ResNet-18 and the mean over each frame.

    Args:
        width: Channels of the first stage; the following ones double it.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, width, KERNEL, stride=FIRST_STRIDE, padding=MARGIN, bias=False)
        with torch.no_grad():
            self.conv1.weight.copy_(filter_bank(width).unsqueeze(1))
        self.bn1 = nn.BatchNorm1d(width)
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(1, 5):
            blocks = nn.ModuleList(
                [
                    BasicBlock1D(
                        in_channels=channels[stage - 1],
                        channels=channels[stage],
                        stride=1 if stage == 1 else 2,
                    ),
                    BasicBlock1D(in_channels=channels[stage], channels=channels[stage], stride=1),
                ]
            )
            setattr(self, f"layer{stage}", blocks)

    def forward(self, x: Tensor, real: RealFrames) -> Tensor:
        """Encodes waveforms.

        Args:
            x: Samples of real frames, (N, 640, 1).
            real: Where these frames are.

        Returns:
            Features, (N, 8·width).
        """
        x = convolve(self.conv1, real.extend(x, MARGIN, MARGIN))  # (N, 640, 1) -> (N, 160, C)
        x = F.silu(batch_norm(self.bn1, x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x, real)
        return x.mean(dim=1)  # (N, 20, D) -> (N, D)


class Conv1dResNet(FrontendInterface):
    """Audio front-end of auto_avsr: 25 features a second from 16 kHz samples.

    Source: Ma et al., Auto-AVSR, ICASSP 2023. Padding enters neither the convolutions nor the
    batch statistics.

    Args:
        width: Channels of the first stage; features are 8 times as wide.
    """

    frame_rate = 25

    def __init__(self, *, width: int = 64) -> None:
        super().__init__()
        self.output_dim = 8 * width
        self.trunk = ResNet1D(width=width)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes waveforms, up to their last full frame. See `FrontendInterface`."""
        frames, real = split_into_frames(x, lengths)
        return real.pad(self.trunk(frames, real)), self.output_lengths(lengths)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of waveforms of given lengths in samples: one for each full 40 ms."""
        return lengths // SAMPLES_PER_FRAME
