"""Times alternatives in one process, so that what else the machine does meets them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """What a call took.

    Attributes:
        milliseconds: Shortest time of a call.
        result: What the last call returned.
    """

    milliseconds: float
    result: Any


def time_in_turns(
    functions: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 3
) -> list[Timing]:
    """Calls functions in turns and takes the best time of each.

    The first round also warms up; the best of at least two rounds leaves that out.

    Args:
        functions: What is to be timed.
        device: Where they compute; a GPU is waited for.
        repeats: Rounds, at least 1.

    Returns:
        A timing of each function.
    """
    best = [float("inf")] * len(functions)
    results: list[Any] = [None] * len(functions)
    for _ in range(repeats):
        for index, function in enumerate(functions):
            _wait_for(device)
            start = time.perf_counter()
            results[index] = function()
            _wait_for(device)
            best[index] = min(best[index], 1000 * (time.perf_counter() - start))
    return [Timing(*timing) for timing in zip(best, results, strict=True)]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
