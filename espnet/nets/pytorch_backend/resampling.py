"""Brings features of different rates to one frame rate: by stacking in pairs, or by repeating."""

import torch.nn.functional as F
from torch import Tensor


def resampled_width(width: int, rate: int, frame_rate: int) -> int:
    """Size of features of size `width`, `rate` a second, at the frame rate."""
    return width * max(1, rate // frame_rate)


def resampled_lengths(lengths: Tensor, rate: int, frame_rate: int) -> Tensor:
    """Frames at the frame rate of sequences of `lengths` features, (B,)."""
    stacked = max(1, rate // frame_rate)
    return (lengths + stacked - 1) // stacked * max(1, frame_rate // rate)


def resample(features: Tensor, rate: int, frame_rate: int) -> Tensor:
    """Stacks neighbours (an odd one out with zeros), or repeats features.

    Args:
        features: (B, T, D), zero where padded.
        rate: Features a second, 25 or 50.
        frame_rate: Frames a second of the model, 25 or 50.

    Returns:
        (B, T / 2, 2·D) from 50 to 25, (B, 2·T, D) from 25 to 50, else as they are.
    """
    if frame_rate > rate:
        return features.repeat_interleave(frame_rate // rate, dim=1)
    stacked = rate // frame_rate
    if stacked == 1:
        return features
    features = F.pad(features, (0, 0, 0, -features.size(1) % stacked))
    return features.reshape(features.size(0), -1, stacked * features.size(2))
