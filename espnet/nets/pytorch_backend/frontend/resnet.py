"""Video front-end: a spatio-temporal convolution and a ResNet-18 on each frame."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.frontend.interface import FrontendInterface
from espnet.nets.pytorch_backend.real_frames import RealFrames, take_or_zero


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and swish around a shortcut.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Factor by which height and width shrink.
    """

    def __init__(self, *, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.activation = nn.SiLU()
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C', H', W')."""
        shortcut = x
        if self.downsample is not None:
            # Every stride-th pixel by hand: oneDNN crashes on a 1×1 convolution that has a stride
            # and fewer than 16 channels, last in memory.
            convolution, norm = self.downsample
            pixels = x[:, :, :: self.stride, :: self.stride]
            shortcut = norm(F.conv2d(pixels, convolution.weight))
        x = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """The four stages of a ResNet-18 and the mean over the image.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016; with swish, as in
    auto_avsr.

    Args:
        width: Channels of the first stage; the following ones double it.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(1, 5):
            blocks = nn.Sequential(
                BasicBlock(
                    in_channels=channels[stage - 1],
                    channels=channels[stage],
                    stride=1 if stage == 1 else 2,
                ),
                BasicBlock(in_channels=channels[stage], channels=channels[stage], stride=1),
            )
            setattr(self, f"layer{stage}", blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to vectors (N, 8C)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


class Conv3dResNet(FrontendInterface):
    """Video front-end of auto_avsr.

    A 5×7×7 convolution sees two frames to each side; all that follows works frame by frame, on
    real frames only, so that padding costs nothing and enters no batch statistics.

    Source: Ma et al., Auto-AVSR, ICASSP 2023; Stafylakis and Tzimiropoulos, Interspeech 2017.

    Args:
        width: Channels after the first convolution; features are 8 times as wide.
    """

    frame_rate = 25

    def __init__(self, *, width: int = 64) -> None:
        super().__init__()
        self.output_dim = 8 * width
        self.frontend3D = nn.Sequential(
            nn.Conv3d(1, width, (5, 7, 7), stride=(1, 2, 2), padding=(2, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.SiLU(),  # In place, it would be no cheaper: gradients need a copy of its input.
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.trunk = ResNet(width=width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes mouth crops, (B, T, 1, H, W). See `FrontendInterface`."""
        real = RealFrames.of(lengths, x)
        frames = self._convolve(real.pack(x.squeeze(2)), real)
        _, norm, activation, pooling = self.frontend3D
        frames = activation(norm(frames.unsqueeze(2)).squeeze(2))
        return real.pad(self.trunk(pooling(frames))), self.output_lengths(lengths)

    def _convolve(self, x: Tensor, real: RealFrames) -> Tensor:
        """The first convolution, (N, H, W) -> (N, C, H/2, W/2).

        As a two-dimensional one whose channels are a frame and those around it, it gives channels
        last in memory, which convolutions and pooling are fastest with, on CPU and GPU alike.
        """
        convolution = self.frontend3D[0]
        seen, reach = convolution.kernel_size[0], convolution.padding[0]
        places = torch.stack([real.neighbour(i - reach) for i in range(seen)], dim=1)  # (N, 5)
        images = take_or_zero(x, places.flatten()).unflatten(0, places.shape)  # (N, 5, H, W)
        return F.conv2d(
            images.contiguous(memory_format=torch.channels_last),
            convolution.weight.squeeze(1).contiguous(memory_format=torch.channels_last),
            stride=convolution.stride[1:],
            padding=convolution.padding[1:],
        )

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of videos of given lengths in frames: one a frame."""
        return lengths
