"""Memory in bytes: that of this process, as Linux tells it, or of PyTorch's tensors on a GPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def of_process(*names: str, file: str = "status") -> int:
    """Sums up sizes that Linux tells of this process in lines of a file of /proc/self."""
    lines = (line.split() for line in (PROCESS / file).read_text().splitlines())
    return sum(1024 * int(words[1]) for words in lines if words[0].rstrip(":") in names)


def in_use(device: torch.device) -> int:
    """What is in use now."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else of_process("VmRSS")


def peak(device: torch.device) -> int:
    """The most that was in use, since the start or since `forget_peak`."""
    # `getrusage` would not do: its peak may be that of the process that started this one.
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else of_process("VmHWM")


def forget_peak(device: torch.device) -> int:
    """Makes the peak what is in use now, and returns it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        (PROCESS / "clear_refs").write_text("5")
    return peak(device)


def peak_of(function: Callable[[], object], device: torch.device) -> int:
    """The most that a call takes beside what is in use before."""
    gc.collect()
    if device.type == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # Freed memory that is used again would not count.
    before = forget_peak(device)
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return peak(device) - before
