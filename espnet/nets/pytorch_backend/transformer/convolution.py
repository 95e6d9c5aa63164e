"""The convolution module of a Conformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.nets_utils import (
    batch_norm_real_frames,
    convolve,
    zero_padding,
)


class ConvolutionModule(nn.Module):
    """Gated pointwise convolution, depthwise convolution, batch norm, swish, pointwise convolution.

    Source: Gulati et al., Conformer, Interspeech 2020, section 2.2. Padding stays out of the
    depthwise convolution and of the batch statistics. (The names in the state dict, "cov" too,
    are those of published checkpoints.)

    Args:
        channels: Feature size D.
        kernel_size: Frames that the depthwise convolution sees, odd.

    Raises:
        ValueError: If `kernel_size` is even.
    """

    def __init__(self, *, channels: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(
                f"convolution kernel of {kernel_size} frames: an odd number is needed to centre it"
            )
        self.pointwise_cov1 = nn.Conv1d(channels, 2 * channels, kernel_size=1)
        self.depthwise_conv = nn.Conv1d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        self.norm = nn.BatchNorm1d(channels)
        self.pointwise_cov2 = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolves over time.

        Args:
            x: Features, (B, T, D).
            mask: Real frames, (B, T), or None if all are real.

        Returns:
            Features, (B, T, D).
        """
        x = zero_padding(F.glu(convolve(self.pointwise_cov1, x), dim=-1), mask)
        x = self.depthwise_conv(x.transpose(1, 2)).transpose(1, 2)
        x = F.silu(batch_norm_real_frames(self.norm, x, mask))
        return convolve(self.pointwise_cov2, x)
