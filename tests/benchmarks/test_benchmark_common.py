import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import common, memory, noise
from benchmarks.common import CPU, Row


def test_functions_take_turns_and_their_best_times_count(monkeypatch):
    seconds = iter([0, 3, 10, 11, 20, 22, 30, 34])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    calls = []

    def call(name):
        calls.append(name)
        return name, len(calls)

    timings = common.time_in_turns([lambda: call("a"), lambda: call("b")], CPU, repeats=2)
    assert calls == ["a", "b", "a", "b"]
    assert [timing.milliseconds for timing in timings] == [2000, 1000]
    assert [timing.result for timing in timings] == [("a", 3), ("b", 4)]


def test_a_process_apart_is_another_one():
    assert common.run_apart(os.getpid) != os.getpid()


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (Row("a", 23.0, 20.0, 1.15), "23.0 | 20.0 | 1.15 times | at most 1.15 times: yes"),
        (Row("a", 23.1, 20.0, 1.15), "23.1 | 20.0 | 1.16 times | at most 1.15 times: no"),
        (
            Row("a", 20.0, 130.0, 6.5, faster=True),
            "20.0 | 130.0 | 6.50 times faster | at least 6.5 times faster: yes",
        ),
        (
            Row("a", 20.0, 129.0, 6.5, faster=True),
            "20.0 | 129.0 | 6.45 times faster | at least 6.5 times faster: no",
        ),
        (
            Row("a", 200.0, 300.0, 1.5, "clips/s", rate=True),
            "200.0 clips/s | 300.0 clips/s | 1.50 times | at most 1.5 times: yes",
        ),
        (Row("a", 0.1234, 0.2468, unit="s"), "0.123 s | 0.247 s | 0.50 times | "),
        (Row("a", 5.0, target=5, unit="s"), "5 s |  |  | at most 5 s: yes"),
        (Row("a", 5.01, target=5, unit="s"), "5.01 s |  |  | at most 5 s: no"),
    ],
)
def test_rows_tell_whether_the_target_is_reached(row, cells):
    assert str(row) == f"| a | {cells} |"


def test_notes_follow_the_table(capsys):
    common.print_table(("x", "y"), [replace(Row("a", 1.0), notes=[n]) for n in ("one", "two")])
    head, line, *rows, empty, first, second = capsys.readouterr().out.splitlines()
    assert (head, line) == ("| x | y |", "|---|---|")
    assert len(rows) == 2
    assert (empty, first, second) == ("", "- one", "- two")


def test_facts_are_told(capsys):
    common.print_facts(CPU, "transformers", precision="bfloat16")
    facts, empty = capsys.readouterr().out.splitlines()
    assert facts.startswith(f"torch {torch.__version__}, transformers ")
    assert ", cpu, 1 CPU threads on " in facts
    assert facts.endswith(" cores, bfloat16")
    assert not empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--device", "cuda"], "--device cuda, but PyTorch finds no GPU: choose --device cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = common.device_parser("Measure.")
    assert common.parse(parser, [])[1] == CPU
    with pytest.raises(SystemExit):
        common.parse(parser, arguments)
    assert message in capsys.readouterr().err


def test_private_memory_is_that_of_this_process():
    names = ("Private_Clean", "Private_Dirty")
    before = memory.of_process(*names, file="smaps_rollup")
    kept = np.ones(4_000_000)
    grown = memory.of_process(*names, file="smaps_rollup") - before
    assert grown == pytest.approx(kept.nbytes, rel=0.1)


def test_a_peak_can_be_forgotten():
    start = memory.in_use(CPU)
    size = 2**26
    block = torch.ones(size)
    high = memory.in_use(CPU)
    del block
    # The block has 4 bytes for each number; Linux counts in steps, and some memory was free.
    assert high > start + 3 * size
    assert memory.in_use(CPU) < high - 3 * size
    assert memory.peak(CPU) > start + 3 * size
    assert memory.forget_peak(CPU) == pytest.approx(memory.peak(CPU), abs=size / 2)
    assert memory.peak(CPU) < high - 2 * size


def test_peak_memory_of_a_call_leaves_out_what_was_there():
    size = 64 * 2**20
    kept = torch.ones(size, dtype=torch.uint8)
    peak = memory.peak_of(lambda: torch.ones(size, dtype=torch.uint8).shape, CPU)
    # A page is 4 KB; what else the process does may add some.
    assert size - 2**20 < peak < size + 16 * 2**20
    assert kept.numel() == size


def test_a_batch_has_real_lengths():
    utterances = noise.make_utterances((100, 60), (16, 9), vocabulary=300)
    x, lengths, targets = noise.make_batch(utterances, CPU)
    assert x["video"].shape == (2, 100, 1, 88, 88)
    assert x["audio"].shape == (2, 64_000, 1)
    assert lengths["video"].tolist() == [100, 60]
    assert lengths["audio"].tolist() == [64_000, 38_400]
    for name, length in (("video", 60), ("audio", 38_400)):
        assert x[name][1, :length].ne(0).flatten(1).any(dim=1).all()
        assert not x[name][1, length:].any()
    assert (targets != -1).sum(dim=1).tolist() == [16, 9]
    real = targets[targets != -1]
    assert 1 <= real.min() <= real.max() < 300
    again = noise.make_batch(noise.make_utterances((100, 60), (16, 9), vocabulary=300), CPU)
    torch.testing.assert_close(again, (x, lengths, targets))
    assert list(noise.make_batch(utterances, CPU, streams=("audio",))[0]) == ["audio"]
