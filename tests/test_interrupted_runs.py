"""Runs that are killed or stopped and go on: to the bit what an uninterrupted run gives."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import disturbed_training

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "disturbed_training.py"
SMALL_BATCHES = ["--max-frames", "100"]  # 6 batches an epoch
ALWAYS = ["--save-minutes", "1e-9"]


class Runs:
    """Runs of one command line, which record their steps."""

    def __init__(self, folder, train_arguments, *more):
        self.folder = folder
        self.train_arguments = train_arguments
        self.more = [*SMALL_BATCHES, *more]

    def path(self, name):
        return self.train_arguments.exp_dir / f"{self.folder.name}_{name}"

    def arguments(self, name, moments, signal_name, *more):
        name = self.path(name).name
        arguments = self.train_arguments(name, "audio", *self.more, *more)
        return [str(self.folder / name), moments, signal_name, *arguments]

    def start(self, name, *rest):
        """In this process."""
        disturbed_training.main(*self.arguments(name, *rest))

    def start_process(self, name, *rest, **environment):
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *self.arguments(name, *rest)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def steps(self, name, process=0):
        path = self.folder / f"{self.path(name).name}.{process}"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def rows(self, name):
        with (self.path(name) / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    def assert_same(self, name, other="whole"):
        """Same rows, same files, and in them the same weights and moments."""
        assert self.rows(name) == self.rows(other)
        one, two = self.path(name), self.path(other)
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        for file in ("last.ckpt", "epoch=0.ckpt", "epoch=1.ckpt", "best.ckpt"):
            found, expected = (torch.load(path / file, weights_only=True) for path in (one, two))
            assert found["global_step"] == expected["global_step"]
            assert found["lr_schedulers"] == expected["lr_schedulers"]
            for part in ("state_dict", "optimizer_states"):
                torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)

    def assert_goes_on(self, name, saved, steps):
        """The run that was cut short goes on after its `saved` steps."""
        before = self.steps(name)
        assert before == self.steps("whole")[: len(before)]
        assert len(before) == steps
        self.start(name, "never", "SIGTERM", "--ckpt-path", "last")
        assert self.steps(name)[steps:] == self.steps("whole")[saved:]
        self.assert_same(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_arguments):
    runs = Runs(tmp_path_factory.mktemp("interrupted"), train_arguments)
    runs.start("whole", "never", "SIGTERM")
    assert len(runs.steps("whole")) == 12
    return runs


@pytest.mark.parametrize(
    ("moment", "more", "saved", "steps"),
    [
        pytest.param("step:0:3", ALWAYS, 4, 4, id="in the middle of an epoch"),
        pytest.param("step:0:5", ALWAYS, 6, 6, id="before a validation", marks=pytest.mark.slow),
        pytest.param("step:1:2", [], 6, 9, id="long after a save", marks=pytest.mark.slow),
        pytest.param("row:0:0", [], 0, 6, id="after the first row", marks=pytest.mark.slow),
        pytest.param("row:1:0", [], 6, 12, id="after the last row", marks=pytest.mark.slow),
        pytest.param("write:0:3", ALWAYS, 3, 4, id="while saving", marks=pytest.mark.slow),
        pytest.param("write:1:0", [], 6, 12, id="writing best.ckpt", marks=pytest.mark.slow),
        pytest.param("write:1:1", [], 6, 12, id="writing epoch=1.ckpt", marks=pytest.mark.slow),
        pytest.param("write:1:2", [], 6, 12, id="writing last.ckpt", marks=pytest.mark.slow),
        pytest.param("write:1:3", [], 12, 12, id="writing the average", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(runs, moment, more, saved, steps):
    name = f"killed_{moment}".replace(":", "_")
    process = runs.start_process(name, moment, "SIGKILL", *more)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    if saved:
        runs.assert_goes_on(name, saved, steps)
    else:
        assert not (runs.path(name) / "last.ckpt").exists()
        assert [row["epoch"] for row in runs.rows(name)] == ["0"]


def stop(runs, name, moments, signal_name, *more, capsys):
    """Starts a run here that a signal stops; returns the line that it prints."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(SystemExit) as info:
        runs.start(name, moments, signal_name, *more)
    assert info.value.code == 128 + getattr(signal, signal_name)
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    files = {path.name for path in runs.path(name).iterdir()}
    assert "last.ckpt" in files
    assert not {"model_avg_10.pth", "learning_curve.png", "last.ckpt.unfinished"} & files
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    return line


@pytest.mark.parametrize(
    ("moments", "signal_name", "saved", "place"),
    [
        ("step:1:2", "SIGTERM", 10, "epoch 2/2, batch 4/6"),
        ("step:0:4", "SIGUSR1", 6, "epoch 1/2, batch 6/6"),  # before the validation
        ("validation:0:0", "SIGTERM", 6, "epoch 1/2"),
        ("validation:1:0", "SIGUSR1", 12, "epoch 2/2"),
        ("row:0:0", "SIGTERM", 6, "epoch 1/2"),
        ("step:0:1,write:0:0", "SIGTERM", 3, "epoch 1/2, batch 3/6"),  # again, while it is saved
    ],
)
def test_a_signal_saves_and_ends_the_run(runs, moments, signal_name, saved, place, capsys):
    name = f"stopped_{moments}".replace(":", "_")
    line = stop(runs, name, moments, signal_name, capsys=capsys)
    last = runs.path(name) / "last.ckpt"
    assert line == (
        f"stopped by {signal_name}: {last} holds the state after {place}; go on with the same "
        "command and --ckpt-path last"
    )
    runs.assert_goes_on(name, saved, saved)


def test_a_signal_waits_for_the_end_of_an_accumulated_step(train_arguments, tmp_path, capsys):
    runs = Runs(tmp_path, train_arguments, "--accumulate-grad-batches", "4")
    runs.start("whole", "never", "SIGTERM")
    line = stop(runs, "stopped", "step:0:0", "SIGTERM", capsys=capsys)
    assert "batch 4/6" in line
    runs.assert_goes_on("stopped", 4, 4)


def test_the_middle_of_an_epoch_needs_the_same_batches(runs, capsys):
    stop(runs, "other_batches", "step:0:1", "SIGTERM", capsys=capsys)
    more = ["--ckpt-path", "last", "--max-frames", "400"]
    with pytest.raises(SystemExit) as info:
        runs.start("other_batches", "never", "SIGTERM", *more)
    assert info.value.code == 2
    assert (
        "the checkpoint is from the middle of an epoch of 6 batches in 1 process(es), now there "
        "are 2 in 1: go on with the same data, --max-frames and --gpus, or"
    ) in capsys.readouterr().err


def test_the_end_of_an_epoch_goes_with_any_batches(runs, capsys):
    stop(runs, "any_batches", "row:0:0", "SIGTERM", capsys=capsys)
    runs.start("any_batches", "never", "SIGTERM", "--ckpt-path", "last", "--max-frames", "400")
    assert [step[:2] for step in runs.steps("any_batches")[6:]] == [[1, 0], [1, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGUSR1"])
def test_slurm_gets_no_second_job(runs, tmp_path, signal_name):
    """Lightning would ask SLURM for one; the batch script of the user does, if it is wanted."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "NODELIST": "localhost"}
    slurm |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    name = f"slurm_{signal_name}"
    process = runs.start_process(name, "step:0:1", signal_name, **environment)
    _, errors = process.communicate()
    assert process.returncode == 128 + getattr(signal, signal_name), errors
    assert f"stopped by {signal_name}" in errors
    assert not (tmp_path / "called").exists()
    runs.assert_goes_on(name, 3, 3)


@pytest.mark.slow
def test_a_signal_to_all_processes_finds_the_data_workers_alive(runs):
    more = ["--num-workers", "2", "--max-epochs", "1000"]
    process = runs.start_process("group", "never", "SIGTERM", *more)
    recorded = runs.folder / f"{runs.path('group').name}.0"
    while process.poll() is None and not recorded.exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert [line for line in errors.splitlines() if "stopped by SIGTERM" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moments", "signal_name", "place"),
    [
        ("step:0:0:0", "SIGTERM", "epoch 1/2, batch 2/3"),  # only the first process gets it
        ("step:0:1:1", "SIGUSR1", "epoch 1/2, batch 3/3"),  # only the second
        ("validation:0:0:1", "SIGTERM", "epoch 1/2"),
        ("step:1:0", "SIGTERM", "epoch 2/2, batch 2/3"),  # both
    ],
)
def test_processes_stop_after_the_same_step(pairs, moments, signal_name, place):
    name = f"stopped_{moments}".replace(":", "_")
    process = pairs.start_process(name, moments, signal_name)
    _, errors = process.communicate()
    assert process.returncode == 128 + getattr(signal, signal_name), errors
    (line,) = [line for line in errors.splitlines() if "stopped by" in line]
    assert f"holds the state after {place};" in line
    process = pairs.start_process(name, "never", signal_name, "--ckpt-path", "last")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    for rank in (0, 1):
        assert pairs.steps(name, rank) == pairs.steps("whole", rank)
    assert len(pairs.steps(name)) == 6
    pairs.assert_same(name)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, train_arguments):
    """Runs of two processes."""
    pairs = Runs(tmp_path_factory.mktemp("pairs"), train_arguments, "--gpus", "2")
    process = pairs.start_process("whole", "never", "SIGTERM")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return pairs


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_good(runs):
    """It is full at the end of the second epoch; with room, the run then goes on."""
    with pytest.raises(SystemExit):
        runs.start("full", "row:0:0", "SIGTERM")
    run = runs.path("full")
    before = {path.name: path.stat().st_size for path in run.iterdir()}
    steps, *arguments = runs.arguments("full", "never", "SIGTERM", "--ckpt-path", "last")
    limit = before["last.ckpt"] // 2
    limited = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "from tests.disturbed_training import main; main(*sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, f"{steps}_limited", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert line.endswith(
        f"best.ckpt could not be written (File too large): {run / 'last.ckpt'} is the last good "
        "checkpoint, so make room and go on with --ckpt-path last"
    )
    assert "Traceback" not in done.stderr
    assert {path.name: path.stat().st_size for path in run.glob("*.ckpt*")} == {
        name: size for name, size in before.items() if ".ckpt" in name
    }
    runs.assert_goes_on("full", 6, 6)
