"""Runs of an earlier version are scored as that version scored them."""

import json
from pathlib import Path

import pytest

import eval as evaluation

RUNS = Path(__file__).parent / "data" / "earlier_runs"


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["audiovisual", "adapters"])
def test_an_earlier_run_is_scored_as_it_was(name, tiny_checkpoints, tmp_path):
    arguments = [
        *["--pretrained-model-path", str(RUNS / name / "model_avg_1.pth")],
        *["--root-dir", str(RUNS), "--test-file", "test.csv", "--output-dir", str(tmp_path)],
        *["--accelerator", "cpu", "--num-workers", "0"],
    ]
    if name == "adapters":
        arguments += ["--audio-encoder-name", str(tiny_checkpoints / "whisper")]
        arguments += ["--decoder-name", str(tiny_checkpoints / "llama")]
    evaluation.main(arguments)
    (found,) = tmp_path.glob("*.jsonl")
    for now, then in zip(results(found), results(RUNS / name / "hypotheses.jsonl"), strict=True):
        assert now.pop("score") == pytest.approx(then.pop("score"), abs=2e-3)
        assert now == then
