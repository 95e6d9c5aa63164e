"""What the front-ends share that take each video frame as an image."""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.image_processing_base import ImageProcessingMixin

from espnet.formats import VIDEO_MEAN, VIDEO_STD
from espnet.nets.encoders import POOLINGS
from espnet.nets.pytorch_backend.frontend.pretrained_encoder import PretrainedEncoder
from espnet.nets.pytorch_backend.real_frames import RealFrames

logger = logging.getLogger(__name__)


class ImageEncoder(PretrainedEncoder, abstract=True):
    """Encodes the frames of a video one by one with a vision Transformer over patches.

    Padding never goes through the backbone, and frames go through it in chunks, which bounds the
    memory: that of a trained backbone too, whose chunks are computed again for their gradients.

    Args:
        name: As for `PretrainedEncoder`.
        pooling: `cls` takes the feature of the class token, `mean` the mean over the patches.
        image_size: Side in pixels to which frames are resized, a multiple of the patch size; None
            for the smallest that holds the frame.
        chunk_frames: Frames that go through the backbone at once.
        **options: As for `PretrainedEncoder`.

    Raises:
        ValueError: If the checkpoint cannot be loaded, or an option does not fit it.
    """

    frame_rate = 25
    mean_and_std = [0.5] * 3, [0.5] * 3  # of images, for checkpoints that do not tell them

    def __init__(
        self,
        name: str,
        *,
        pooling: str = "cls",
        image_size: int | None = None,
        chunk_frames: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self.patch_size = self.backbone.config.patch_size
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown: choose {' or '.join(POOLINGS)}")
        if image_size is not None and image_size % self.patch_size:
            raise ValueError(
                f"--vision-image-size {image_size} is no multiple of the patch size "
                f"{self.patch_size} of this checkpoint: choose one that is"
            )
        self.pooling = pooling
        self.image_size = image_size
        self.chunk_frames = chunk_frames
        mean, std = image_statistics(name, self.mean_and_std)
        # x·std + mean is the pixel in [0, 1], which the backbone wants by its own mean and std.
        self.register_buffer("scale", VIDEO_STD / std.view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", ((VIDEO_MEAN - mean) / std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes videos, (B, T, 1, H, W). See `FrontendInterface`."""
        real = RealFrames.of(lengths, x)
        frames = real.pack(x)  # (B, T, 1, H, W) -> (N, 1, H, W)
        features = torch.cat([self._chunk(chunk) for chunk in frames.split(self.chunk_frames)])
        return real.pad(features), lengths

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of videos of given lengths in frames: one each."""
        return lengths

    def images(self, frames: Tensor) -> Tensor:
        """Makes of grey frames what the backbone takes.

        Args:
            frames: (N, 1, H, W), normalised by this project's mean and deviation.

        Returns:
            (N, 3, H', W'), resized and normalised as the backbone was trained.
        """
        side = self.image_size
        if side is None:
            side = -(-max(frames.shape[2:]) // self.patch_size) * self.patch_size
        if tuple(frames.shape[2:]) != (side, side):
            resized = F.interpolate(frames.float(), (side, side), mode="bilinear", antialias=True)
            frames = resized.to(frames.dtype)
        return frames * self.scale + self.shift  # (N, 1, H', W') -> (N, 3, H', W')

    @abstractmethod
    def hidden_states(self, images: Tensor) -> Iterator[Tensor]:
        """The input of the first layer, and the output of each layer.

        Args:
            images: (N, 3, H, W).

        Yields:
            Hidden states, (N, 1 + patches, D) each, the class token first.
        """

    def _chunk(self, frames: Tensor) -> Tensor:
        """Features of some frames, (N, 1, H, W) -> (N, D)."""
        if self.gradient_checkpointing and self.training and self.trains_backbone:
            return checkpoint(self._encode, frames, use_reentrant=False)
        return self._encode(frames)

    def _encode(self, frames: Tensor) -> Tensor:
        tokens = self.choose(self.hidden_states(self.images(frames)))  # (N, 1 + patches, D)
        return tokens[:, 0] if self.pooling == "cls" else tokens[:, 1:].mean(dim=1)


def image_statistics(name: str, default: tuple[list[float], list[float]]) -> tuple[Tensor, Tensor]:
    """Reads the mean and deviation by which a checkpoint's images are normalised.

    Args:
        name: Hub id or folder.
        default: Those of the published checkpoints, for one without a preprocessor_config.json.

    Returns:
        Mean and deviation of each colour, (3,) each.
    """
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(name)
        mean, std = config["image_mean"], config["image_std"]
        if not len(mean) == len(std) == 3:
            raise KeyError
    except (OSError, KeyError, TypeError):
        mean, std = default
        logger.warning(
            "%s does not say by what its images are normalised (preprocessor_config.json): taken "
            "are mean %s and std %s",
            *(name, mean, std),
        )
    return torch.tensor(mean), torch.tensor(std)
