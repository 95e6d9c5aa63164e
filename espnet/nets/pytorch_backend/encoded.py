"""What encoders hand to decoder, CTC and search."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Video(NamedTuple):
    """Video that reaches a decoder beside the memory, not in it.

    Attributes:
        features: (B, T', V), padded with anything.
        lengths: Real frames, (B,), on the host.
    """

    features: Tensor
    lengths: Tensor


class Encoded(NamedTuple):
    """A batch after the encoder.

    Attributes:
        memory: What the decoder attends to, (B, T, D), padded with anything.
        lengths: Real frames, (B,), on the host.
        video: For decoders that attend to it by gates of its own; None for all others.
    """

    memory: Tensor
    lengths: Tensor
    video: Video | None = None

    @property
    def beside(self) -> dict[str, Video]:
        """Keyword arguments of decoder and scorers: the video, if there is any."""
        return {} if self.video is None else {"video": self.video}


def join_video(memory: Tensor, video: Video | None) -> Tensor:
    """The memory with the video's features behind its own, (B, T, D + V); zeros where it is over.

    Args:
        memory: (B, T, D).
        video: Of the same utterances; None for the memory as it is.
    """
    if video is None:
        return memory
    return torch.cat([memory, fit_length(video.features, memory.size(1))], dim=-1)


def fit_length(features: Tensor, length: int) -> Tensor:
    """Pads (B, T, D) with zeros, or cuts it, to (B, length, D)."""
    return F.pad(features, (0, 0, 0, length - features.size(1)))
