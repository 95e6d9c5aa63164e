"""Brings front-ends of different rates to one clock: by stacking in pairs, or by repeating."""

import torch.nn.functional as F
from torch import Tensor


def clock_width(width: int, rate: int, clock: int) -> int:
    """Size of features once they are on the clock.

    Args:
        width: Size D as the front-end gives them.
        rate: Features a second that the front-end gives.
        clock: Frames a second of the model.
    """
    return width * max(1, rate // clock)


def clock_lengths(lengths: Tensor, rate: int, clock: int) -> Tensor:
    """Frames on the clock of sequences of `lengths` features, (B,)."""
    stacked = max(1, rate // clock)
    return (lengths + stacked - 1) // stacked * max(1, clock // rate)


def to_clock(features: Tensor, rate: int, clock: int) -> Tensor:
    """Stacks neighbours (an odd one out with zeros), or repeats features.

    Args:
        features: (B, T, D), zero where padded.
        rate: Features a second, 25 or 50.
        clock: Frames a second of the model, 25 or 50.

    Returns:
        (B, T / 2, 2·D) from 50 to 25, (B, 2·T, D) from 25 to 50, else as they are.
    """
    if clock > rate:
        return features.repeat_interleave(clock // rate, dim=1)
    stacked = rate // clock
    if stacked == 1:
        return features
    features = F.pad(features, (0, 0, 0, -features.size(1) % stacked))
    return features.reshape(features.size(0), -1, stacked * features.size(2))
