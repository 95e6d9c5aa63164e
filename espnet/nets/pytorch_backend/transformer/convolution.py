"""The convolution module of a Conformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.real_frames import RealFrames, batch_norm, convolve


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

    def forward(self, x: Tensor, real: RealFrames) -> Tensor:
        """Convolves over time.

        Args:
            x: Features of real frames, (N, D).
            real: Where these frames are.

        Returns:
            Features, (N, D).
        """
        x = real.pad(F.glu(convolve(self.pointwise_cov1, x), dim=-1))
        x = real.pack(self.convolve_each_channel(x))
        return convolve(self.pointwise_cov2, F.silu(batch_norm(self.norm, x)))

    def convolve_each_channel(self, x: Tensor) -> Tensor:
        """The depthwise convolution, (B, T, D) -> (B, T, D)."""
        convolution = self.depthwise_conv
        if x.is_cuda:
            return convolution(x.transpose(1, 2)).transpose(1, 2)
        # CPUs take a quarter of the time for it as a two-dimensional one with channels last.
        image = x.transpose(1, 2).unsqueeze(3)  # (B, T, D) -> (B, D, T, 1)
        convolved = F.conv2d(
            image,
            convolution.weight.unsqueeze(3),
            convolution.bias,
            padding=(*convolution.padding, 0),
            groups=convolution.groups,
        )
        return convolved.squeeze(3).transpose(1, 2)
