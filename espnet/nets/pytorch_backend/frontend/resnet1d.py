"""Audio front-end: a one-dimensional ResNet-18 on the waveform."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.frontend.waveform import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    cut_to_frames,
)
from espnet.nets.pytorch_backend.nets_utils import (
    batch_norm_real_frames,
    convolve,
    padding_mask,
    zero_padding,
)

LOWEST_HZ, HIGHEST_HZ = 100, 7000  # centres of the first convolution's filters at the start
KERNEL = 80  # samples that the first convolution sees, 5 ms
FIRST_STRIDE = 4
POOLING = 20  # 4 · 2 · 2 · 2 · 20 = 640


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
    seconds = (torch.arange(KERNEL) - (KERNEL - 1) / 2) / SAMPLE_RATE
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

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Applies the block.

        Args:
            x: Features, (B, S, C), zero where padded.
            mask: Real steps of the output, (B, S / stride), or None if all are real.

        Returns:
            Features, (B, S / stride, C'), zero where padded.
        """
        shortcut = x
        if self.downsample is not None:
            convolution, norm = self.downsample
            shortcut = batch_norm_real_frames(norm, convolve(convolution, x), mask)
        x = F.silu(batch_norm_real_frames(self.bn1, convolve(self.conv1, x), mask))
        x = batch_norm_real_frames(self.bn2, convolve(self.conv2, zero_padding(x, mask)), mask)
        return zero_padding(F.silu(x + shortcut), mask)


class ResNet1D(nn.Module):
    """A convolution over 5 ms, the four stages of a ResNet-18 and the mean over each frame.

    Args:
        width: Channels of the first stage; the following ones double it.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, width, KERNEL, stride=FIRST_STRIDE, padding=38, bias=False)
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

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Encodes waveforms.

        Args:
            x: Waveforms, (B, S, 1), S a multiple of 640, zero where padded.
            lengths: Real samples, (B,), multiples of 640.

        Returns:
            Features, (B, S / 640, 8·width), zero where padded.
        """
        x = convolve(self.conv1, x)  # (B, S, 1) -> (B, S/4, C)
        mask = padding_mask(lengths // FIRST_STRIDE, x.size(1))
        x = zero_padding(F.silu(batch_norm_real_frames(self.bn1, x, mask)), mask)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                if mask is not None:
                    mask = mask[:, :: block.stride]
                x = block(x, mask)
        return x.unflatten(1, (-1, POOLING)).mean(dim=2)  # (B, T·20, D) -> (B, T, D)


class Conv1dResNet(nn.Module):
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
        """Encodes waveforms; samples beyond the last full frame are left out.

        Args:
            x: Waveforms normalised over the utterance, (B, S, 1).
            lengths: Samples, (B,).

        Returns:
            Features, (B, S // 640, 8·width), zero where padded, and their lengths, (B,).
        """
        x, frames = cut_to_frames(x, lengths)
        return self.trunk(x, frames * SAMPLES_PER_FRAME), frames

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of waveforms of given lengths in samples: one for each full 40 ms."""
        return lengths // SAMPLES_PER_FRAME
