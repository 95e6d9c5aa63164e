import json
import os
import signal
import subprocess
import sys
import traceback
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train
from datamodule.label_list import LabelList
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.option_tree import from_flat
from espnet.utils.options import Options
from espnet.utils.recovery.failed_batch import (
    FailedBatch,
    describe,
    is_of_other_process,
    is_out_of_memory,
)

FAILING_PROCESS = """
import os, sys
import torch
import lightning, train

training_step = lightning.ModelModule.training_step

def fail(module, batch, batch_idx):
    if batch_idx == 1 and str(module.global_rank) == os.environ["FAILING_RANK"]:
        torch.empty(1 << 60)
    return training_step(module, batch, batch_idx)

lightning.ModelModule.training_step = fail
train.main()
"""
NOTHING_PRETRAINED = {
    "max_frames": 1600,
    "vision_encoder": "resnet",
    "audio_encoder": "resnet1d",
    "decoder": "transformer",
    "gradient_checkpointing": True,
    "use_qlora": False,
}


def need_too_much():
    torch.empty(1 << 60)


def raise_memory_error():
    raise MemoryError


def raise_on_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def fail_otherwise():
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.fixture
def failing(monkeypatch):
    """Makes the second batch of the second epoch fail in a way of one's choice."""

    def set_up(fail):
        encode = E2E.encode
        calls = []

        def encode_or_fail(model, *rest):
            calls.append(model.training)
            if sum(calls) == 8:  # of 6 an epoch
                fail()
            return encode(model, *rest)

        monkeypatch.setattr(E2E, "encode", encode_or_fail)

    return set_up


def expected_utterances(corpus, found):
    rows = (corpus / "labels/train.csv").read_text().splitlines()
    lines = [int(utterance["line"].rsplit(" ", 1)[1]) for utterance in found]
    fields = [rows[line - 1].split(",") for line in lines]
    return [
        {
            "id": f"{dataset}/{path.removesuffix('.mp4')}",
            "frames": int(frames),
            "line": f"{corpus / 'labels/train.csv'}, line {line}",
        }
        for line, (dataset, path, frames, *_) in zip(lines, fields, strict=True)
    ]


@pytest.mark.parametrize("fail", [need_too_much, raise_memory_error, raise_on_gpu])
def test_out_of_memory_is_one_line_and_the_batch_is_named(
    train_arguments, corpus, failing, fail, capsys
):
    failing(fail)
    with pytest.raises(SystemExit) as info:
        train.main(train_arguments(fail.__name__, "audio", "--max-frames", "100"))
    assert info.value.code == 2
    file = train_arguments.exp_dir / fail.__name__ / "failed_batch.json"
    record = json.loads(file.read_text())
    assert (record["epoch"], record["batch"], record["process"]) == (1, 1, 0)
    assert record["utterances"] == expected_utterances(corpus, record["utterances"])
    assert len(record["utterances"]) == 2
    frames = 2 * max(utterance["frames"] for utterance in record["utterances"])
    assert record["frames"] == frames
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert line.endswith(
        f"out of memory at a batch of 2 utterances and {frames} frames (named in {file}): lower "
        "--max-frames (now 100)"
    )


def test_other_errors_keep_their_traceback(train_arguments, failing, caplog):
    failing(fail_otherwise)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as info:
        train.main(train_arguments("otherwise", "audio", "--max-frames", "100"))
    assert "fail_otherwise" in "".join(traceback.format_tb(info.tb))
    file = train_arguments.exp_dir / "otherwise" / "failed_batch.json"
    record = json.loads(file.read_text())
    assert record["error"] == "RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    assert f"its utterances are named in {file}" in caplog.text


def test_errors_between_steps_name_no_batch(train_arguments, monkeypatch):
    def fail(module):
        if not module.trainer.sanity_checking:
            raise RuntimeError("in validation")

    monkeypatch.setattr("lightning.ModelModule.on_validation_epoch_end", fail)
    with pytest.raises(RuntimeError, match="in validation"):
        train.main(train_arguments("between", "audio"))
    assert not (train_arguments.exp_dir / "between" / "failed_batch.json").exists()


def test_a_run_without_files_has_none(train_arguments, capsys, monkeypatch):
    monkeypatch.setattr(E2E, "losses", lambda *_: need_too_much())
    with pytest.raises(SystemExit):
        train.main(train_arguments("fast", "audio", "--fast-dev-run"))
    error = capsys.readouterr().err
    assert "frames: lower --max-frames (now 400)" in error
    assert not (train_arguments.exp_dir / "fast").exists()


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as info:
        need_too_much()
    assert is_out_of_memory(info.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_of_other_process(RuntimeError("gloo: Connection closed by peer [127.0.0.1]:33200"))
    assert not is_of_other_process(info.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


@pytest.mark.slow
def test_processes_end_together_and_the_one_that_failed_names_its_batch(train_arguments, tmp_path):
    """Whichever it is, the others neither wait for it nor blame their own batch."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING_PROCESS)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[4])}
    for rank in (0, 1):
        more = ["--max-frames", "100", "--gpus", "2"]
        done = subprocess.run(
            [sys.executable, str(script), *train_arguments(f"rank{rank}", "audio", *more)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **environment, "FAILING_RANK": str(rank)},
        )
        assert done.returncode in (2, -signal.SIGKILL), done.stderr
        assert "Traceback" not in done.stderr
        assert "error: out of memory at a batch of 2 utterances" in done.stderr
        files = {path.name for path in (train_arguments.exp_dir / f"rank{rank}").glob("*.json")}
        assert files == {"failed_batch_rank1.json" if rank else "failed_batch.json"}


def test_an_empty_batch_is_described(corpus):
    labels = LabelList(str(corpus), "train.csv")
    assert describe([], labels) == {"frames": 0, "utterances": []}


@pytest.mark.parametrize(
    ("options", "remedies"),
    [
        ({}, "(now 1600)"),
        ({"gradient_checkpointing": False}, "(now 1600)"),
        ({"vision_encoder": None, "audio_encoder": "whisper", "use_qlora": True}, "(now 1600)"),
        (
            {"vision_encoder": "clip"},
            "(now 1600), or put pretrained parts into 4 bits with --use-qlora",
        ),
        (
            {"decoder": "llama", "gradient_checkpointing": False, "use_qlora": True},
            "(now 1600), or give --gradient-checkpointing",
        ),
    ],
)
def test_remedies_are_those_that_are_left(corpus, options, remedies):
    failed = FailedBatch(None)
    trainer = Namespace(
        current_epoch=0,
        global_rank=0,
        datamodule=Namespace(train_dataset=Namespace(labels=LabelList(str(corpus), "train.csv"))),
    )
    options = from_flat(Options, {**NOTHING_PRETRAINED, **options})
    error = MemoryError()
    remedy = failed.remedy(error, options)
    assert remedy.startswith("out of memory outside of a training step: lower --max-frames (now 16")
    failed.begin({"indices": torch.tensor([0])}, 0)
    failed.on_exception(trainer, None, error)
    remedy = failed.remedy(error, options)
    assert remedy.startswith("out of memory at a batch of 1 utterance and ")
    assert remedy.endswith(f": lower --max-frames {remedies}")
    assert failed.remedy(RuntimeError("of another kind"), options) is None


def test_a_full_disk_does_not_hide_the_error(corpus, tmp_path, caplog):
    failed = FailedBatch(tmp_path / "missing")
    trainer = Namespace(
        current_epoch=0,
        global_rank=1,
        datamodule=Namespace(train_dataset=Namespace(labels=LabelList(str(corpus), "train.csv"))),
    )
    failed.begin({"indices": torch.tensor([0])}, 0)
    failed.on_exception(trainer, None, MemoryError())
    assert "failed_batch_rank1.json could not be written (No such file" in caplog.text
    options = from_flat(Options, NOTHING_PRETRAINED)
    assert failed.remedy(MemoryError(), options).endswith("frames: lower --max-frames (now 1600)")
