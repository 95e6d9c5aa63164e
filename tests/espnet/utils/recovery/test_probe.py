import json
import os
import random
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from espnet.utils.recovery.failed_batch import FailedBatch
from espnet.utils.recovery.probe import ProbeBatch

ROOT = Path(__file__).parents[4]
SMALL_BATCHES = ["--max-frames", "100"]


def last_of(train_arguments, name):
    return torch.load(train_arguments.exp_dir / name / "last.ckpt", weights_only=True)


def assert_same(one, two):
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(one[part], two[part], rtol=0, atol=0)


@pytest.mark.parametrize("more", [[], ["--precision", "bf16-mixed"]], ids=["32", "bf16"])
def test_training_is_as_it_is_without(train_arguments, more, capsys, monkeypatch):
    """The weights, the moments and what was drawn are the same to the bit."""
    name = "_".join(["probe", *more])
    more = [*SMALL_BATCHES, *more, "--max-epochs", "1"]
    train.main(train_arguments(f"{name}_without", "audiovisual", *more))
    assert "Largest batch" not in capsys.readouterr().out
    tried = []
    whole = ProbeBatch._try

    def note(self, trainer, module, batch):
        tried.append(batch["indices"].tolist())
        whole(self, trainer, module, batch)
        assert all(parameter.grad is None for parameter in module.parameters())

    monkeypatch.setattr(ProbeBatch, "_try", note)
    train.main(train_arguments(f"{name}_with", "audiovisual", *more, "--probe-batch"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "Largest" in line]
    assert len(lines) == len(tried) >= 1
    for line in lines:
        found = re.fullmatch(
            r"Largest batch: (\d+) utterances? and (\d+) frames, peak memory ([\d.]+) GB", line
        )
        assert int(found[2]) <= 100
        assert 0.1 < float(found[3]) < 64
    assert_same(
        last_of(train_arguments, f"{name}_with"), last_of(train_arguments, f"{name}_without")
    )


def test_random_generators_and_statistics_are_as_before(train_arguments, monkeypatch):
    states = []
    start = ProbeBatch.on_train_start

    def state(module):
        return {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1],  # noqa: NPY002
            "python": random.getstate(),
            "buffers": [buffer.clone() for buffer in module.buffers()],
        }

    def note(self, trainer, module):
        states.append(state(module))
        start(self, trainer, module)
        states.append(state(module))

    monkeypatch.setattr(ProbeBatch, "on_train_start", note)
    train.main(train_arguments("states", "audio", "--probe-batch", "--max-epochs", "1"))
    before, after = states
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_out_of_memory_is_one_line_before_the_first_step(train_arguments, monkeypatch, capsys):
    forward = "espnet.nets.pytorch_backend.e2e_asr_conformer.E2E.forward"
    monkeypatch.setattr(forward, lambda *_: torch.empty(1 << 60))
    with pytest.raises(SystemExit) as info:
        train.main(train_arguments("too_large", "audio", *SMALL_BATCHES, "--probe-batch"))
    assert info.value.code == 2
    run = train_arguments.exp_dir / "too_large"
    record = json.loads((run / "failed_batch.json").read_text())
    assert record["batch"] is None
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"and {record['frames']} frames" in line
    assert "lower --max-frames (now 100)" in line
    assert not (run / "last.ckpt").exists()


@pytest.mark.parametrize(("eight_bits", "bytes_each"), [(False, 8), (True, 2)])
def test_memory_for_the_moments_is_taken(eight_bits, bytes_each):
    from espnet.utils.recovery.probe import _missing_states

    weight = torch.nn.Parameter(torch.zeros(3, 5))
    other = torch.nn.Parameter(torch.zeros(7))
    kind = type("AdamW8bit", (torch.optim.AdamW,), {}) if eight_bits else torch.optim.AdamW
    optimizer = kind([weight, other])
    states = _missing_states([optimizer])
    assert sum(state.numel() * state.element_size() for state in states) == 22 * bytes_each
    if not eight_bits:  # A resumed run has them already.
        weight.grad = torch.ones(3, 5)
        optimizer.step()
        assert [state.shape for state in _missing_states([optimizer])] == [(7,), (7,)]


def test_weights_that_are_spread_over_processes_are_refused():
    trainer = Namespace(strategy=type("FSDPStrategy", (), {})())
    with pytest.raises(ValueError, match="cannot try batches with FSDPStrategy: leave it out"):
        ProbeBatch(FailedBatch(None)).on_train_start(trainer, None)


@pytest.mark.slow
def test_two_processes_try_at_the_same_time(train_arguments):
    for name, more in (("pair_without", []), ("pair_with", ["--probe-batch"])):
        more = [*SMALL_BATCHES, "--gpus", "2", "--max-epochs", "1", *more]
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *train_arguments(name, "audio", *more)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Largest batch") == len(more) - 6
    assert_same(last_of(train_arguments, "pair_with"), last_of(train_arguments, "pair_without"))
