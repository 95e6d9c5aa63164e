"""Video front-end: a spatio-temporal convolution and a ResNet-18 on each frame."""

import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.nets_utils import padding_mask


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
        self.activation = nn.SiLU(inplace=True)
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


class Conv3dResNet(nn.Module):
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
            nn.SiLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.trunk = ResNet(width=width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes mouth crops.

        Args:
            x: Normalised grey video at 25 frames a second, (B, T, 1, H, W).
            lengths: Frames, (B,).

        Returns:
            Features, (B, T, 8·width), zero where padded, and their lengths, (B,).
        """
        convolution, norm, activation, pooling = self.frontend3D
        batch, length = x.shape[:2]
        mask = padding_mask(lengths, length)
        if mask is not None:
            x = x * mask[:, :, None, None, None]
        frames = convolution(x.transpose(1, 2))  # (B, 1, T, H, W) -> (B, C, T, H/2, W/2)
        # Channels last is what convolution libraries are fastest with, on CPU and GPU alike.
        frames = frames.permute(0, 2, 3, 4, 1).flatten(0, 1).contiguous()  # (B·T, H/2, W/2, C)
        if mask is not None:
            real = mask.flatten().nonzero().squeeze(1)
            frames = frames.index_select(0, real)  # (N, H/2, W/2, C)
        frames = frames.permute(0, 3, 1, 2)  # (N, C, H/2, W/2), still channels last in memory
        frames = activation(norm(frames.unsqueeze(2)).squeeze(2))
        vectors = self.trunk(pooling(frames))  # (N, 8·width)
        if mask is not None:
            padded = vectors.new_zeros(batch * length, self.output_dim)
            vectors = padded.index_copy(0, real, vectors)
        return vectors.view(batch, length, -1), self.output_lengths(lengths)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of videos of given lengths in frames: one a frame."""
        return lengths
