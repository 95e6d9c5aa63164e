"""The entry scripts, used as a user would: train, resume, average, evaluate, make mistakes."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import eval as evaluation
import lightning as train_module
import train
from datamodule.media import write_video
from datamodule.train_tokenizer import train_tokenizer
from espnet.utils import building
from tests.auto_avsr_cases import CASES, fill

ROOT = Path(__file__).parents[1]
RUN_FILES = {
    "best.ckpt",
    "config.yaml",
    "epoch=0.ckpt",
    "epoch=1.ckpt",
    "last.ckpt",
    "learning_curve.png",
    "metrics.csv",
    "model_avg_10.pth",
    "test",
    "unigram.model",
    "unigram_units.txt",
}


@pytest.fixture(scope="session")
def run_dir(train_arguments):
    """An audio-visual run with modality dropout, trained and scored once."""
    more = ["--modality-dropout", "0.3", "0.3", "--test-file", "test.csv"]
    train.main(train_arguments("base", "audiovisual", *more))
    return train_arguments.exp_dir / "base"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_of(path):
    return torch.load(path, weights_only=True)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=0, msg=name)


def test_a_run_leaves_these_files_and_no_other(run_dir):
    assert {path.name for path in run_dir.iterdir()} == RUN_FILES
    assert {path.name for path in (run_dir / "test").iterdir()} == {
        "hypotheses_audiovisual_clean.jsonl",
        "summary.json",
        "wer_over_snr.png",
    }


def test_config_holds_every_option_and_the_versions(run_dir):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["modality_dropout"] == [0.3, 0.3]
    # What follows a "+" names the build, and not all builds' packages say it.
    release, theirs = (v.split("+")[0] for v in (config["versions"]["torch"], torch.__version__))
    assert release == theirs
    assert set(vars(train.train_parser().parse_args([]))) <= set(config)
    lists = {name: "token ids of spm/unigram" for name in ("train.csv", "val.csv", "test.csv")}
    assert config["label_lists"] == lists


def test_metrics_have_a_row_an_epoch(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(float(row[name]) > 0 for row in rows for name in ("loss", "loss_val", "wer_val"))


def test_the_average_is_that_of_the_epochs(run_dir):
    epochs = [state_of(run_dir / f"epoch={epoch}.ckpt")["state_dict"] for epoch in (0, 1)]
    average = state_of(run_dir / "model_avg_10.pth")
    for name, value in average.items():
        if value.is_floating_point():
            mean = (epochs[0][f"model.{name}"] + epochs[1][f"model.{name}"]) / 2
            torch.testing.assert_close(value, mean)


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_models_of_one_stream(train_arguments, corpus, modality, capsys):
    train.main(train_arguments(modality, modality))
    run = train_arguments.exp_dir / modality
    assert {path.name for path in run.iterdir()} == RUN_FILES - {"test"}
    average = str(run / "model_avg_10.pth")
    arguments = ["--root-dir", str(corpus), "--test-file", "test.csv", "--num-workers", "0"]
    evaluation.main(["--pretrained-model-path", average, *arguments])
    assert f"{modality}" in capsys.readouterr().out
    lines = read_lines(next((run / f"model_avg_10_test_{modality}").glob("hypotheses_*.jsonl")))
    assert len(lines) == 4


def test_evaluation_takes_its_options_from_the_run(run_dir, corpus, tmp_path, capsys):
    """Three options suffice; the result is that of the test after training."""
    evaluation.main(
        [
            *["--pretrained-model-path", str(run_dir / "model_avg_10.pth")],
            *["--root-dir", str(corpus), "--test-file", "test.csv"],
            *["--output-dir", str(tmp_path)],
        ]
    )
    out = capsys.readouterr().out
    assert "audiovisual_clean: WER" in out
    assert "real-time factor" in out
    name = "hypotheses_audiovisual_clean.jsonl"
    lines = read_lines(tmp_path / name)
    assert lines == read_lines(run_dir / "test" / name)
    transcripts = dict(
        line.split(maxsplit=1) for line in (corpus / "labels/test.txt").read_text().splitlines()
    )
    found = {line["id"].removeprefix("demo/"): line["reference"] for line in lines}
    assert found == transcripts
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary[0]["words"]["reference"] == sum(len(t.split()) for t in transcripts.values())


@pytest.mark.parametrize("modality", ["audio", "video"])
def test_one_checkpoint_serves_every_modality(run_dir, corpus, tmp_path, modality, capsys):
    evaluation.main(
        [
            *["--pretrained-model-path", str(run_dir / "last.ckpt"), "--modality", modality],
            *["--root-dir", str(corpus), "--test-file", "test.csv", "--num-workers", "0"],
            *["--output-dir", str(tmp_path)],
        ]
    )
    assert modality in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())[0]["utterances"] == 4


def test_several_noise_levels_at_once_are_repeatable(run_dir, corpus, tmp_path):
    results = []
    for name in ("one", "two"):
        evaluation.main(
            [
                *["--pretrained-model-path", str(run_dir / "model_avg_10.pth")],
                *["--root-dir", str(corpus), "--test-file", "test.csv", "--num-workers", "0"],
                *["--modality", "audio", "--decode-snr-target", "999999", "0", "-5"],
                *["--output-dir", str(tmp_path / name)],
            ]
        )
        paths = sorted((tmp_path / name).glob("*.jsonl"))
        assert [path.stem for path in paths] == [
            "hypotheses_audio_-5dB",
            "hypotheses_audio_0dB",
            "hypotheses_audio_clean",
        ]
        results.append([read_lines(path) for path in paths])
    assert results[0] == results[1]
    assert results[0][0] != results[0][2]  # The noise is heard.


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    run_dir, train_arguments, monkeypatch
):
    more = ["--modality-dropout", "0.3", "0.3"]
    arguments = train_arguments("resumed", "audiovisual", *more)
    stopped = RuntimeError("stopped")

    def stop(module):
        if module.current_epoch == 1:
            raise stopped

    with monkeypatch.context() as patch:
        patch.setattr("lightning.ModelModule.on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            train.main([*arguments, "--debug"])
    resumed = train_arguments.exp_dir / "resumed"
    assert not (resumed / "epoch=1.ckpt").exists()
    train.main([*arguments, "--ckpt-path", "last"])
    for name in ("last.ckpt", "epoch=1.ckpt"):
        one, two = state_of(run_dir / name), state_of(resumed / name)
        assert_same(one["state_dict"], two["state_dict"])
        assert one["global_step"] == two["global_step"]
    with (resumed / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]


def test_a_run_may_be_resumed_with_other_options(run_dir, train_arguments, capsys):
    """Rates follow the share of the training that is done, whatever the steps of an epoch."""
    words = ["--modality-dropout", "0.3", "0.3", "--ckpt-path", str(run_dir / "epoch=0.ckpt")]
    words += ["--max-epochs", "4", "--max-frames", "130", "--lr", "5e-4", "--weight-decay", "0"]
    train.main(train_arguments("changed", "audiovisual", *words))
    changed = train_arguments.exp_dir / "changed"
    with (changed / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    steps = int(rows[1]["step"]) - int(rows[0]["step"])
    assert steps > int(rows[0]["step"]) - steps  # of an epoch before
    for row in rows:
        last = (int(row["epoch"]) + 1) * steps - 1
        expected = 5e-4 * train_module.warmup_cosine(last, steps, 4 * steps)
        assert float(row["lr"]) == pytest.approx(expected, rel=1e-4)
    last, before = state_of(changed / "last.ckpt"), state_of(run_dir / "epoch=0.ckpt")
    assert {group["weight_decay"] for group in last["optimizer_states"][0]["param_groups"]} == {0}
    name = "proj_encoder.weight"
    moved = last["state_dict"][f"model.{name}"] - before["state_dict"][f"model.{name}"]
    assert moved.abs().max() > 1e-4
    assert "Resuming with --lr 0.0005, 0.001 before" in capsys.readouterr().out
    config = yaml.safe_load((changed / "config.yaml").read_text())
    (resumed,) = config["resumed"]
    assert (config["lr"], resumed["epoch"]) == (5e-4, 0)
    assert resumed["changed"] == {
        "lr": [1e-3, 5e-4],
        "max_epochs": [2, 4],
        "max_frames": [400, 130],
        "test_file": ["test.csv", None],
        "weight_decay": [0.03, 0.0],
    }
    error = error_of(
        capsys, train, train_arguments("x", "audiovisual", *words, "--optimizer", "adamw8bit")
    )
    assert "--optimizer adamw8bit, but " in error
    assert "was trained with adamw: resume with that, or start anew" in error


def test_last_starts_anew_before_there_is_a_checkpoint(train_arguments):
    train.main(train_arguments("anew", "audio", "--ckpt-path", "last", "--fast-dev-run"))
    assert not (train_arguments.exp_dir / "anew").exists()


def run_script(script, arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
def test_two_processes_give_what_one_gives(train_arguments):
    """The same utterances a step, split in two uneven halves, with batch norms synchronised."""
    more = ["--max-frames", "2000", "--dropout-rate", "0", "--test-file", "test.csv"]
    more += ["--max-epochs", "1", "--warmup-epochs", "0"]
    train.main(train_arguments("alone", "audiovisual", *more))
    arguments = train_arguments("pair", "audiovisual", *more, "--gpus", "2", "--strategy", "ddp")
    done = run_script("train.py", arguments)
    assert done.returncode == 0, done.stderr
    alone, pair = (train_arguments.exp_dir / name for name in ("alone", "pair"))
    one, two = (state_of(path / "last.ckpt") for path in (alone, pair))
    assert one["global_step"] == two["global_step"] == 1
    # The optimiser's first moments are the gradients. Batch statistics are summed in another
    # order, which small gradients behind many batch norms feel: compare them as one vector.
    gradients = [
        torch.cat([moment["exp_avg"].flatten() for moment in state.values()])
        for state in (one["optimizer_states"][0]["state"], two["optimizer_states"][0]["state"])
    ]
    assert (gradients[0] - gradients[1]).norm() < 2e-3 * gradients[0].norm()
    rows = [list(csv.DictReader((path / "metrics.csv").open())) for path in (alone, pair)]
    for name in ("loss", "loss_val", "loss_ctc_val", "wer_val"):
        values = [[float(row[name]) for row in table] for table in rows]
        assert values[0] == pytest.approx(values[1], rel=1e-3), name
    lines = [read_lines(path / "test/hypotheses_audiovisual_clean.jsonl") for path in (alone, pair)]
    assert [line["id"] for line in lines[0]] == [line["id"] for line in lines[1]]


@pytest.mark.slow
def test_two_processes_lose_streams_each_on_its_own(train_arguments):
    """Even when no utterance of a process has lost one, its gradients are all there."""
    more = ["--gpus", "2", "--modality-dropout", "0.1", "0.1", "--test-file", "test.csv"]
    done = run_script("train.py", train_arguments("dropout_pair", "audiovisual", *more))
    assert done.returncode == 0, done.stderr


def test_clips_without_transcripts_are_decoded(run_dir, corpus, tmp_path, capsys):
    rows = (corpus / "labels/test.csv").read_text().splitlines()
    clips = corpus / "labels/clips.csv"
    clips.write_text("".join(f"{row.rpartition(',')[0]}\n" for row in rows))
    name = "hypotheses_audiovisual_clean.jsonl"
    arguments = ["--pretrained-model-path", str(run_dir / "model_avg_10.pth")]
    arguments += ["--root-dir", str(corpus), "--test-file", clips.name]
    evaluation.main([*arguments, "--output-dir", str(tmp_path)])
    clips.unlink()
    assert "no transcripts to score" in capsys.readouterr().out
    expected = [{**line, "reference": None} for line in read_lines(run_dir / "test" / name)]
    assert read_lines(tmp_path / name) == expected


def test_silence_is_trained_and_scored(train_arguments, corpus):
    rows = (corpus / "labels/train.csv").read_text().splitlines()
    silent = [row if number else f"{row.rpartition(',')[0]}," for number, row in enumerate(rows)]
    path = corpus / "labels/silent.csv"
    path.write_text("".join(f"{row}\n" for row in silent))
    lists = [f"--{name}-file=silent.csv" for name in ("train", "val", "test")]
    train.main(train_arguments("silence", "audio", "--max-epochs", "1", *lists))
    path.unlink()
    (summary,) = json.loads((train_arguments.exp_dir / "silence/test/summary.json").read_text())
    assert summary["utterances"] == len(rows)
    metrics = (train_arguments.exp_dir / "silence/metrics.csv").read_text()
    assert "nan" not in metrics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["modality"])
def test_auto_avsr_checkpoints_are_evaluated(case, corpus, tmp_path, capsys):
    """A plain state dict, with the modality and sizes told by flags."""
    path = tmp_path / "published.pth"
    torch.save(fill(case["state_dict"]), path)
    units = (
        "".join(f"w{i} {i}\n" for i in range(1, case["odim"] - 2)) + f"<unk> {case['odim'] - 2}\n"
    )
    (tmp_path / "units.txt").write_text(units)
    shutil.copytree(corpus / "demo", tmp_path / "data/demo")
    (tmp_path / "data/labels").mkdir()
    rows = (corpus / "labels/test.csv").read_text().splitlines()
    ids = "".join(",".join(row.split(",")[:3]) + ",1 2 3\n" for row in rows)
    (tmp_path / "data/labels/test.csv").write_text(ids)
    dims = case["dims"]
    sizes = [f"--{name}={size}" for name, size in dims.items() if name != "kernel"]
    evaluation.main(
        [
            *[f"--modality={case['modality']}", f"--root-dir={tmp_path / 'data'}"],
            *["--test-file=test.csv", f"--pretrained-model-path={path}", "--num-workers=0"],
            *[f"--sp-model-path={corpus / 'spm/unigram.model'}", "--beam-size=2", *sizes],
            f"--dict-path={tmp_path / 'units.txt'}",
        ]
    )
    assert "4 utterances" in capsys.readouterr().out
    name = "video" if case["modality"] == "video" else "audio_clean"
    lines = read_lines(tmp_path / f"published_test_{case['modality']}/hypotheses_{name}.jsonl")
    assert {line["reference"] for line in lines} == {"w1w2w3"}


def error_of(capsys, script, arguments):
    """The one line that a mistaken command line prints."""
    with pytest.raises(SystemExit) as info:
        script.main([str(argument) for argument in arguments])
    assert info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_all_problems_of_a_command_line_are_named_at_once(capsys, tmp_path):
    error = error_of(
        capsys,
        train,
        [
            *["--exp-name", "x", "--modality", "audio", "--root-dir", tmp_path],
            *["--train-file", "no.csv", "--aheads", "7", "--cnn-module-kernel", "30"],
            *["--transfer-encoder", "--modality-dropout", "0.2", "0.2", "--ckpt-path", "gone.ckpt"],
        ],
    )
    for part in (
        "--train-file no.csv does not exist",
        "multiple of --aheads 7",
        "--cnn-module-kernel 30 must be odd",
        "need --pretrained-model-path",
        "--modality-dropout needs a model of video and audio, not of audio alone",
        "--ckpt-path gone.ckpt does not exist",
    ):
        assert part in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", r"empty"),
        ("demo,a.mp4\n", "line 1"),
        ("demo,a.mp4,50,3 4 9999\n", "line 1.*9999"),
        ("demo,a.mp4,many,3 4\n", "line 1.*many"),
        ("demo,a.mp4,5000,3 4\n", "line 1.*5000.*--max-frames"),
    ],
)
def test_bad_label_lists_stop_before_anything_is_written(
    train_arguments, corpus, rows, message, capsys
):
    (corpus / "labels/bad.csv").write_text(rows)
    arguments = train_arguments("bad", "audio", "--train-file", "bad.csv")
    error = error_of(capsys, train, arguments)
    assert re.search(message, error), error
    assert not (train_arguments.exp_dir / "bad").exists()


def test_a_missing_clip_is_named_before_anything_is_written(
    train_arguments, corpus, tmp_path, capsys
):
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    row = (root / "labels/val.csv").read_text().splitlines()[1]
    clip = root.joinpath(*row.split(",")[:2])
    clip.unlink()
    error = error_of(capsys, train, train_arguments("missing", "video", "--root-dir", root))
    assert f"{clip}: it does not exist, but" in error
    assert "val.csv, line 2 names it" in error
    assert not (train_arguments.exp_dir / "missing").exists()


def test_video_ignores_noise_levels(run_dir, corpus, tmp_path):
    evaluation.main(
        [
            *["--pretrained-model-path", str(run_dir / "model_avg_10.pth")],
            *["--root-dir", str(corpus), "--test-file", "test.csv", "--num-workers", "0"],
            *["--modality", "video", "--decode-snr-target", "10", "0"],
            *["--output-dir", str(tmp_path)],
        ]
    )
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 1


def test_a_folder_of_noise_is_its_files(run_dir, corpus, tmp_path):
    results = []
    for noise in (corpus / "noise", corpus / "noise" / "babble.wav"):
        evaluation.main(
            [
                *["--pretrained-model-path", str(run_dir / "model_avg_10.pth")],
                *["--root-dir", str(corpus), "--test-file", "test.csv", "--num-workers", "0"],
                *["--modality", "audio", "--decode-snr-target", "0", "--noise-file", str(noise)],
                *["--output-dir", str(tmp_path / noise.name)],
            ]
        )
        results.append((tmp_path / noise.name / "summary.json").read_text())
    rates = [[row["wer"] for row in json.loads(text)] for text in results]
    assert rates[0] == rates[1]


def test_a_checkpoint_that_cannot_be_resumed_is_refused(run_dir, train_arguments, capsys):
    average = run_dir / "model_avg_10.pth"
    arguments = train_arguments("refused", "audiovisual", "--modality-dropout", "0.3", "0.3")
    error = error_of(capsys, train, [*arguments, "--ckpt-path", average])
    assert "holds weights only" in error
    arguments = train_arguments("refused", "audio", "--ckpt-path", run_dir / "last.ckpt")
    assert "does not fit the model" in error_of(capsys, train, arguments)
    assert not (train_arguments.exp_dir / "refused").exists()


def test_accumulated_batches_give_what_one_batch_gives(train_arguments):
    """The mean is over the utterances of a step, however they are cut into batches."""
    fixed = ["--dropout-rate", "0", "--lr", "1e-3", "--warmup-epochs", "0", "--max-epochs", "1"]

    class Frozen(train_module.ModelModule):
        def on_train_epoch_start(self):
            for part in self.model.modules():
                if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                    part.eval()

    states = []
    for name, frames, batches in (("whole", "2000", "1"), ("parts", "250", "8")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning.ModelModule", Frozen)
            more = ["--max-frames", frames, "--accumulate-grad-batches", batches, *fixed]
            train.main(train_arguments(name, "audio", *more))
        state = state_of(train_arguments.exp_dir / name / "last.ckpt")
        assert state["global_step"] == 1
        states.append(state["optimizer_states"][0]["state"])
    for one, two in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(one["exp_avg"], two["exp_avg"], rtol=1e-3, atol=1e-6)


def test_an_unreadable_clip_is_named_or_skipped(train_arguments, corpus, tmp_path, capsys):
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    row = (root / "labels/train.csv").read_text().splitlines()[3]
    clip = root.joinpath(*row.split(",")[:2])
    clip.write_bytes(b"not a video")
    arguments = train_arguments("unreadable", "video", "--root-dir", root)
    error = error_of(capsys, train, arguments)
    assert str(clip) in error
    arguments = train_arguments("skipping", "video", "--root-dir", str(root), "--skip-bad-clips")
    train.main(arguments)
    with (train_arguments.exp_dir / "skipping/metrics.csv").open() as file:
        assert [float(row["bad_clips"]) for row in csv.DictReader(file)] == [1, 1]


def test_whatever_is_wrong_with_an_utterance_can_be_skipped(
    train_arguments, corpus, tmp_path, capsys, caplog
):
    """Frames smaller than the crop, no clip, a text without a token; in validation too."""
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    transcripts = (line.split(maxsplit=1) for line in open(root / "labels/train.txt"))
    listed = [row.split(",") for row in (root / "labels/train.csv").read_text().splitlines()]
    frames = {clip: number for _, clip, number, _ in listed}
    rows = [f"demo,{n}.mp4,{frames[f'{n}.mp4']},{text.strip()}\n" for n, text in transcripts]
    silent = f"{rows[5].rsplit(',', 1)[0]},\u200b\u200b\n"
    (root / "labels/train.csv").write_text("".join([*rows, silent]))
    for file, row in (("train", 1), ("train", 2), ("val", 0)):
        line = (root / f"labels/{file}.csv").read_text().splitlines()[row].split(",")
        write_video(root / "demo" / line[1], np.zeros((int(line[2]), 24, 24), np.uint8))
    (root / "demo" / rows[3].split(",")[1]).unlink()
    arguments = train_arguments("varied", "video", "--root-dir", str(root))
    assert "does not exist, but" in error_of(capsys, train, arguments)
    shutil.copyfile(root / "demo" / rows[4].split(",")[1], root / "demo" / rows[3].split(",")[1])
    assert "train.csv, line 13: the text " in error_of(capsys, train, arguments)
    (root / "demo" / rows[3].split(",")[1]).unlink()
    train.main([*arguments, "--skip-bad-clips"])
    with (train_arguments.exp_dir / "varied/metrics.csv").open() as file:
        assert [float(row["bad_clips"]) for row in csv.DictReader(file)] == [3, 3]
    text = caplog.text
    assert re.search(
        r"left out 1 clip: 1 as .*train.csv, line 13: the text .* gives no token", text
    )
    for epoch in (1, 2):
        assert re.search(
            rf"the training of epoch {epoch} left out 3 clips: 2 as .*mp4: got frames of 24x24 "
            r"pixels.*; 1 as .*mp4: no such file",
            text,
        )
        assert f"the validation of epoch {epoch} left out 1 clip: 1 as " in text


def test_evaluation_never_skips_a_clip(run_dir, corpus, tmp_path, capsys):
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    row = (root / "labels/test.csv").read_text().splitlines()[0]
    clip = root.joinpath(*row.split(",")[:2])
    clip.unlink()
    error = error_of(
        capsys,
        evaluation,
        [
            *["--pretrained-model-path", run_dir / "model_avg_10.pth", "--root-dir", root],
            *["--test-file", "test.csv", "--output-dir", tmp_path / "out"],
        ],
    )
    assert str(clip) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--adim", "32"],
            r"does not fit the model: proj_encoder.weight is \(16, 32\), not \(32, 32\)",
        ),
        (["--accelerator", "gpu"], "PyTorch sees no GPU: use --accelerator cpu"),
        (["--test-file", "gone.csv"], "--test-file gone.csv does not exist: looked for"),
    ],
)
def test_mistakes_in_an_evaluation(run_dir, corpus, tmp_path, more, message, capsys):
    if "gpu" in more and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    error = error_of(
        capsys,
        evaluation,
        [
            *["--pretrained-model-path", run_dir / "model_avg_10.pth", "--root-dir", corpus],
            *["--test-file", "test.csv", "--output-dir", tmp_path / "out", *more],
        ],
    )
    assert re.search(message, error), error


def test_a_stream_that_the_model_cannot_spare(train_arguments, corpus, capsys):
    arguments = ["--pretrained-model-path", "x.pth", "--root-dir", corpus, "--modality", "audio"]
    assert "x.pth does not exist" in error_of(capsys, evaluation, arguments)
    path = train_arguments.exp_dir / "plain.pth"
    path.touch()
    arguments = ["--pretrained-model-path", path, "--root-dir", corpus, "--test-file", "test.csv"]
    assert "tells its modality: give --modality" in error_of(capsys, evaluation, arguments)


def test_pretrained_weights_are_transferred(run_dir, train_arguments):
    average = run_dir / "model_avg_10.pth"
    more = ["--pretrained-model-path", average, "--transfer-frontend", "--fast-dev-run"]
    train.main([str(a) for a in train_arguments("transferred", "audio", *more)])


def test_lack_of_memory_for_the_model_is_one_line(train_arguments, capsys, monkeypatch):
    def allocate(*_):
        torch.empty(2**60)  # the allocator's own error

    monkeypatch.setattr(building, "build_model", allocate)
    error = error_of(capsys, train, train_arguments("large", "audio"))
    assert "out of memory outside of training: choose a smaller model" in error
    assert "lower --decode-max-frames (now 1600)" in error


@pytest.fixture
def replaced_vocabulary(corpus, tmp_path):
    """The corpus with a SentencePiece model of the same size that was trained on other words."""
    root = tmp_path / "replaced"
    shutil.copytree(corpus, root)
    units = (root / "spm/unigram_units.txt").read_text().splitlines()
    before = [line.split()[0] for line in units]
    turned = [piece[:0:-1] for piece in before if len(piece) > 1 and piece[0] == "\u2581"]
    found = train_tokenizer(
        turned,
        root / "spm/unigram",
        vocab_size=len(units) + 2,
        seed_pieces=[f"\u2581{word}" for word in turned],
    )
    assert len(found) == len(units)
    assert list(found) != before
    return root


def test_a_vocabulary_that_was_replaced_in_place_is_not_taken(
    run_dir, replaced_vocabulary, train_arguments, tmp_path, capsys
):
    """The run's own copy is; another one is refused, whatever is done with the checkpoint."""
    root = ["--root-dir", str(replaced_vocabulary)]
    moved = tmp_path / "moved" / "model_avg_10.pth"
    moved.parent.mkdir()
    shutil.copyfile(run_dir / "model_avg_10.pth", moved)
    out = ["--test-file", "test.csv", "--output-dir", str(tmp_path / "out")]
    root += ["--label-format", "ids"]
    average = ["--pretrained-model-path", str(run_dir / "model_avg_10.pth")]
    evaluation.main([*average, *root, *out])
    name = "hypotheses_audiovisual_clean.jsonl"
    assert read_lines(tmp_path / "out" / name) == read_lines(run_dir / "test" / name)
    other = ["--sp-model-path", str(replaced_vocabulary / "spm/unigram.model")]
    for checkpoint in ("model_avg_10.pth", "last.ckpt"):
        path = ["--pretrained-model-path", str(run_dir / checkpoint)]
        error = error_of(capsys, evaluation, [*path, *root, *out, *other])
        assert f"{checkpoint} was trained with another vocabulary" in error
    dropout = ["--modality-dropout", "0.3", "0.3"]
    for more in (
        ["--ckpt-path", run_dir / "last.ckpt"],
        average,
        ["--pretrained-model-path", moved],
    ):
        arguments = train_arguments("replaced", "audiovisual", *dropout, *root, *more)
        assert "was trained with another vocabulary" in error_of(capsys, train, arguments)
    assert not (train_arguments.exp_dir / "replaced").exists()


def test_checkpoints_that_do_not_tell_their_vocabulary_load_as_before(
    run_dir, replaced_vocabulary, corpus, tmp_path
):
    """So did those of earlier versions, whose runs have no copy either."""
    run = tmp_path / "earlier"
    run.mkdir()
    torch.save(dict(state_of(run_dir / "model_avg_10.pth")), run / "model_avg_10.pth")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["sp_model_path"] == str(corpus / "spm/unigram.model")
    config["sp_model_path"] = str(replaced_vocabulary / "spm/unigram.model")
    config["dict_path"] = str(replaced_vocabulary / "spm/unigram_units.txt")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--root-dir", str(corpus), "--test-file", "test.csv", "--label-format", "ids"]
    evaluation.main(["--pretrained-model-path", str(run / "model_avg_10.pth"), *arguments])


@pytest.fixture
def bad_test_list(corpus, tmp_path):
    """The corpus with two clips of its test list that cannot be read, and their ids."""
    root = tmp_path / "bad"
    shutil.copytree(corpus, root)
    rows = (root / "labels/test.csv").read_text().splitlines()
    clips = [Path(*row.split(",")[:2]) for row in rows[1:3]]
    (root / clips[0]).write_bytes(b"not a video")
    write_video(root / clips[1], np.zeros((50, 24, 24), np.uint8))
    return root, [str(clip.with_suffix("")) for clip in clips]


def scoring_words(run_dir, root, out, *more):
    words = ["--pretrained-model-path", run_dir / "model_avg_10.pth", "--root-dir", root]
    words += ["--test-file", "test.csv", "--output-dir", out, "--num-workers", "0", *more]
    return list(map(str, words))


HYPOTHESES = "hypotheses_audiovisual_clean.jsonl"


def test_a_bad_clip_does_not_stop_an_evaluation(run_dir, bad_test_list, tmp_path, capsys):
    """It counts as an empty hypothesis, is listed, and the exit code says so."""
    root, bad = bad_test_list
    with pytest.raises(SystemExit) as info:
        evaluation.main(scoring_words(run_dir, root, tmp_path / "out"))
    assert info.value.code == 3
    shown = capsys.readouterr()
    assert "2 bad clips counted as empty" in shown.out
    assert "2 clips could not be read and count as empty hypotheses" in shown.err
    good = {line["id"]: line for line in read_lines(run_dir / "test" / HYPOTHESES)}
    lines = read_lines(tmp_path / "out" / HYPOTHESES)
    assert [line["id"] for line in lines] == list(good)
    for line in lines:
        if line["id"] in bad:
            assert (line["hypothesis"], line["score"]) == ("", None)
            assert line["id"] in line["error"]
        else:
            assert line["hypothesis"] == good[line["id"]]["hypothesis"]
            assert "error" not in line
    (summary,) = json.loads((tmp_path / "out/summary.json").read_text())
    assert [clip["id"] for clip in summary["bad_clips"]] == bad
    words = sum(len(line["reference"].split()) for line in lines)
    assert (summary["utterances"], summary["words"]["reference"]) == (4, words)
    lost = sum(len(line["reference"].split()) for line in lines if line["id"] in bad)
    assert summary["words"]["deletions"] >= lost
    assert {path.name for path in (tmp_path / "out").iterdir()} == {HYPOTHESES, "summary.json"}

    evaluation.main(scoring_words(run_dir, root, tmp_path / "skip", "--skip-bad-clips"))
    assert "2 bad clips left out" in capsys.readouterr().out
    (summary,) = json.loads((tmp_path / "skip/summary.json").read_text())
    assert (summary["utterances"], summary["words"]["reference"]) == (2, words - lost)
    assert [clip["id"] for clip in summary["bad_clips"]] == bad
    assert not {line["id"] for line in read_lines(tmp_path / "skip" / HYPOTHESES)} & set(bad)


def test_babble_does_not_spread_a_bad_clip(run_dir, bad_test_list, tmp_path):
    """The list's own utterances are the babble: the bad ones spoil no other."""
    root, bad = bad_test_list
    (root / bad[0]).with_suffix(".wav").write_bytes(b"no sound")
    for name in ("train.csv", "val.csv"):
        (root / "labels" / name).unlink()
    more = ["--modality", "audio", "--decode-snr-target", "0"]
    with pytest.raises(SystemExit):
        evaluation.main(scoring_words(run_dir, root, tmp_path / "out", *more))
    lines = read_lines(tmp_path / "out/hypotheses_audio_0dB.jsonl")
    assert [line["id"] for line in lines if "error" in line] == bad[:1]


def decoded_ids(monkeypatch, words):
    """Runs eval.py, and returns how many utterances it decodes."""
    count = []
    decode = train_module.ModelModule.decode

    def counting(module, batch):
        count.extend(batch["indices"].tolist())
        return decode(module, batch)

    with monkeypatch.context() as patch:
        patch.setattr("lightning.ModelModule.decode", counting)
        evaluation.main(words)
    return count


def test_a_killed_evaluation_goes_on(run_dir, corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = scoring_words(run_dir, corpus, out, "--decode-max-frames", "1")  # one at a time
    decode = train_module.ModelModule.decode
    calls = []

    def killed(module, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(module, batch)

    with monkeypatch.context() as patch:
        patch.setattr("lightning.ModelModule.decode", killed)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            evaluation.main(words)
    assert len(read_lines(out / HYPOTHESES)) == 2
    assert not (out / "summary.json").exists()
    with (out / HYPOTHESES).open("a") as file:
        file.write('{"id": "demo/te')  # as a process that is killed may leave it
    error = error_of(capsys, evaluation, [*words, "--resume", "--beam-size", "2"])
    assert "were decoded with beam_size 3, not 2: give that, or leave --resume out" in error
    assert len(decoded_ids(monkeypatch, [*words, "--resume"])) == 2
    whole = read_lines(run_dir / "test" / HYPOTHESES)
    for one, two in zip(read_lines(out / HYPOTHESES), whole, strict=True):
        assert one.pop("score") == pytest.approx(two["score"], abs=1e-3)
        assert one == {name: value for name, value in two.items() if name != "score"}
    (summary,) = json.loads((out / "summary.json").read_text())
    (expected,) = json.loads((run_dir / "test/summary.json").read_text())
    assert (summary["wer"], summary["words"]) == (expected["wer"], expected["words"])
    assert decoded_ids(monkeypatch, [*words, "--resume"]) == []
    (again,) = json.loads((out / "summary.json").read_text())
    assert (again["wer"], again["real_time_factor"]) == (summary["wer"], None)


def test_a_mended_clip_is_decoded_by_resuming(
    run_dir, bad_test_list, corpus, tmp_path, monkeypatch
):
    root, bad = bad_test_list
    words = scoring_words(run_dir, root, tmp_path / "out")
    with pytest.raises(SystemExit):
        evaluation.main(words)
    for name in bad:
        shutil.copyfile(corpus / f"{name}.mp4", root / f"{name}.mp4")
    assert len(decoded_ids(monkeypatch, [*words, "--resume"])) == 2
    found = [(line["id"], line["hypothesis"]) for line in read_lines(tmp_path / "out" / HYPOTHESES)]
    expected = read_lines(run_dir / "test" / HYPOTHESES)
    assert found == [(line["id"], line["hypothesis"]) for line in expected]


def test_hypotheses_of_unknown_origin_are_not_gone_on_with(run_dir, corpus, tmp_path, capsys):
    (tmp_path / HYPOTHESES).write_text("")
    error = error_of(capsys, evaluation, scoring_words(run_dir, corpus, tmp_path, "--resume"))
    assert "tells how its hypotheses were decoded: leave --resume out" in error


def test_lack_of_memory_in_an_evaluation_is_one_line(
    run_dir, corpus, tmp_path, capsys, monkeypatch
):
    def allocate(*_):
        torch.empty(2**60)

    monkeypatch.setattr("lightning.ModelModule.decode", allocate)
    error = error_of(capsys, evaluation, scoring_words(run_dir, corpus, tmp_path / "out"))
    assert "lower --decode-max-frames (now 1600) or --beam-size if it was the scoring" in error


def test_training_ends_though_a_test_clip_is_bad(train_arguments, bad_test_list, capsys):
    root, bad = bad_test_list
    arguments = train_arguments("bad_test", "video", "--root-dir", str(root))
    with pytest.raises(SystemExit) as info:
        train.main([*arguments, "--test-file", "test.csv"])
    assert info.value.code == 3
    assert "count as empty hypotheses" in capsys.readouterr().err
    (summary,) = json.loads((train_arguments.exp_dir / "bad_test/test/summary.json").read_text())
    assert [clip["id"] for clip in summary["bad_clips"]] == bad


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 2, 3, 4])
def test_two_processes_go_on_with_an_evaluation(run_dir, bad_test_list, tmp_path, kept):
    """Also where fewer utterances are left than there are processes."""
    root, bad = bad_test_list
    words = scoring_words(run_dir, root, tmp_path / "out", "--accelerator", "cpu")
    pair = ["--gpus", "2", "--strategy", "ddp"]
    done = run_script("eval.py", [*words, *pair])
    assert done.returncode == 3, done.stderr
    path = tmp_path / "out" / HYPOTHESES
    whole = read_lines(path)
    assert [line["id"] for line in whole if "error" in line] == bad
    in_order = sorted(whole, key=lambda line: "error" in line)
    lines = [
        json.dumps({**line, "error": None}).replace(', "error": null', "") for line in in_order
    ]
    for half, number in ((path, 0), (path.with_suffix(".rank1.jsonl"), 1)):
        half.write_text("".join(f"{line}\n" for line in lines[:kept][number::2]))
    done = run_script("eval.py", [*words, *pair, "--resume"])
    assert done.returncode == (3 if kept < 4 else 0), done.stderr
    found = read_lines(path)
    assert [line["id"] for line in found] == [line["id"] for line in whole]
    assert [line["hypothesis"] for line in found] == [line["hypothesis"] for line in whole]
    assert sum("error" in line for line in found) == 4 - max(kept, 2)
    assert {found.name for found in path.parent.iterdir()} == {HYPOTHESES, "summary.json"}
