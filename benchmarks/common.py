"""What the benchmarks share: timing, rows and tables, and the device of the command line."""

import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """What a call took."""

    milliseconds: float  # shortest time of a call
    result: Any  # what the last call returned


def time_in_turns(
    functions: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 3
) -> list[Timing]:
    """Calls functions in turns, so that what else the machine does meets them alike.

    The first round also warms up; the best of at least two rounds leaves that out. A GPU is waited
    for.

    Returns:
        A timing of each function, with the best of its times.
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


def run_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, which has nothing of this one's memory.

    Raises:
        BrokenProcessPool: If the process ended without a result.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class TableRow:
    """A row of a table in Markdown; its notes are printed after the table, a sentence each."""

    notes: Sequence[str] = ()

    def cells(self) -> list[str]:
        """What its columns hold."""
        raise NotImplementedError

    def __str__(self) -> str:
        return markdown_line(self.cells())


@dataclass(frozen=True)
class Row(TableRow):
    """A measurement, as a multiple of a reference or as it is."""

    what: str  # what was measured, and against what
    value: float  # what came out
    # What its reference gives, in the same unit; None: there is none.
    reference: float | None = None
    # The most that the ratio should be (the least where it is told how much faster), or the most
    # that the value should be where there is no reference; None: there is none.
    target: float | None = None
    unit: str = ""  # unit of value and reference; empty if the head of the table tells it
    faster: bool = False  # whether the ratio is how many times faster than the reference it is
    # Whether values are rates, so that the ratio of times is the reference over the value.
    rate: bool = False
    notes: Sequence[str] = ()  # more about it

    @property
    def ratio(self) -> float | None:
        """The ratio that the target is for."""
        if self.reference is None:
            return None
        upside_down = self.faster or self.rate
        return self.reference / self.value if upside_down else self.value / self.reference

    @property
    def is_met(self) -> bool:
        """Whether the target, if there is one, is reached."""
        if self.target is None:
            return True
        measured = self.value if self.ratio is None else self.ratio
        return measured >= self.target if self.faster else measured <= self.target

    def cells(self) -> list[str]:
        """What its columns hold: what, value, reference, ratio and target."""
        cells = [self.what, self._figure(self.value), "", "", ""]
        unit = self.unit
        if self.reference is not None:
            unit = "times faster" if self.faster else "times"
            cells[2:4] = self._figure(self.reference), f"{self.ratio:.2f} {unit}"
        if self.target is not None:
            bound = "at least" if self.faster else "at most"
            cells[4] = f"{bound} {self.target:g} {unit}: {verdict(self.is_met)}"
        return cells

    def _figure(self, value: float) -> str:
        return f"{value:{'.1f' if value >= 10 else '.3g'}} {self.unit}".rstrip()


def verdict(reached: bool) -> str:
    """The word for whether a target is reached."""
    return "yes" if reached else "no"


def print_table(head: Sequence[str], rows: Iterable[TableRow]) -> None:
    """Prints a table, each row once it is there, and then the notes of all rows."""
    print(markdown_line(head), f"|{'---|' * len(head)}", sep="\n", flush=True)
    notes: list[str] = []
    for row in rows:
        print(row, flush=True)
        notes += row.notes
    if notes:
        print("", *(f"- {note}" for note in notes), sep="\n")


def markdown_line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def print_facts(device: torch.device, *packages: str, precision: str | None = None) -> None:
    """Prints what figures depend on: versions of torch and of packages, device and precision."""
    versions = [f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in packages)]
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    threads = f"{torch.get_num_threads()} CPU threads on {os.cpu_count()} cores"
    print(", ".join([*versions, where, threads, *([precision] if precision else [])]), end="\n\n")


def print_report(
    device: torch.device,
    rows: Iterable[Row],
    columns: tuple[str, str] = ("time (ms)", "reference (ms)"),
    packages: Sequence[str] = (),
    precision: str | None = None,
) -> None:
    """Prints what figures depend on, and a table; `columns` are those of value and reference."""
    print_facts(device, *packages, precision=precision)
    print_table(("what", *columns, "ratio", "target"), rows)


def device_parser(description: str) -> ArgumentParser:
    """Makes a parser with the flag --device."""
    parser = ArgumentParser(description=description)
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: %(default)s)",
    )
    return parser


def parse(parser: ArgumentParser, argv: list[str] | None) -> tuple[Namespace, torch.device]:
    """Parses the command line of a parser of `device_parser`: options, and the device named."""
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch finds no GPU: choose --device cpu")
    return options, torch.device(options.device)
