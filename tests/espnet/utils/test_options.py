import re
import subprocess
import sys
from pathlib import Path

import pytest

from espnet.option_tree import from_flat, to_flat
from espnet.utils.options import Options, eval_parser, one_line, train_parser
from espnet.utils.run_config import completed

ROOT = Path(__file__).parents[3]
AUTO_AVSR_TRAIN = [
    *["--exp-dir=exp", "--exp-name=base", "--group-name=lips", "--modality=video"],
    *["--root-dir=/data", "--train-file=train.csv", "--val-file=val.csv", "--test-file=test.csv"],
    *["--num-nodes=4", "--gpus=8", "--pretrained-model-path=lrw.pth", "--transfer-frontend"],
    *["--transfer-encoder", "--warmup-epochs=5", "--max-epochs=75", "--max-frames=1600"],
    *["--lr=0.001", "--weight-decay=0.03", "--ctc-weight=0.1", "--train-num-buckets=400"],
    *["--ckpt-path=last.ckpt", "--slurm-job-id=7", "--debug"],
]


def resolved(*arguments):
    """Options of a command line, completed, by name."""
    return to_flat(completed(from_flat(Options, vars(train_parser().parse_args(arguments)))))


def test_auto_avsrs_training_command_line():
    args = train_parser().parse_args(AUTO_AVSR_TRAIN)
    assert (args.num_nodes, args.gpus, args.slurm_job_id, args.debug) == (4, 8, 7.0, True)
    assert args.transfer_frontend
    assert args.transfer_encoder


def test_auto_avsrs_defaults():
    options = resolved("--modality", "video")
    expected = {
        "exp_dir": "./exp",
        "val_file": "lrs3_test_transcript_lengths_seg16s.csv",
        "warmup_epochs": 5,
        "max_epochs": 75,
        "max_frames": 1600,
        "lr": 1e-3,
        "weight_decay": 0.03,
        "ctc_weight": 0.1,
        "label_smoothing": 0.1,
        "vision_encoder": "resnet",
        "decoder": "transformer",
        "train_num_buckets": 400,
        "adim": 768,
        "aheads": 12,
        "eunits": 3072,
        "elayers": 12,
        "dunits": 3072,
        "dlayers": 6,
        "beam_size": 40,
        "ctc_decode_weight": 0.1,
    }
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--decoder", "llama"], (0.0, 0.0, 0.0, "lower", True, "meta-llama/Llama-3.2-1B")),
        (["--decoder", "whisper"], (0.0, 0.0, 0.0, "lower", True, "openai/whisper-small")),
        (["--decoder", "whisper", "--ctc-weight", "0"], (0.0, 0.0, 0.0, "lower", True, None)),
        (["--decoder", "llama", "--ctc-weight", "0.2"], (0.2, 0.1, 0.0, "lower", True, None)),
        (["--decoder", "llama", "--no-freeze-decoder"], (0.0, 0.0, 0.0, "lower", False, None)),
        (["--label-smoothing", "0"], (0.1, 0.1, 0.0, "keep", False, None)),
    ],
)
def test_defaults_follow_the_decoder(arguments, expected):
    options = resolved("--modality", "audio", *arguments)
    *values, name = expected
    names = ("ctc_weight", "ctc_decode_weight", "label_smoothing", "text_case", "freeze_decoder")
    assert [options[name] for name in names] == values
    assert name in (None, options["decoder_name"])


def test_auto_avsrs_evaluation_command_line():
    args = eval_parser().parse_args(
        [
            *["--modality=audio", "--root-dir=/data", "--test-file=test.csv"],
            *["--pretrained-model-path=asr.pth", "--decode-snr-target=-5", "--debug"],
        ]
    )
    assert args.decode_snr_target == [-5.0]
    args = eval_parser().parse_args(["--pretrained-model-path=asr.pth"])
    assert args.decode_snr_target == (999999,)


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_comes_without_torch(script):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['script', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--modality" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "0"], "argument --lr: 0.0 is out of range: a number above 0"),
        (["--max-epochs", "0"], "argument --max-epochs: 0 is out of range: at least 1"),
        (["--ctc-weight", "1.5"], r"1.5 is out of range: a number in \[0, 1\]"),
        (["--num-workers", "-1"], "-1 is out of range: at least 0"),
        (["--modality", "lips"], "invalid choice: 'lips'"),
        (["--weight-decay", "-1"], "-1.0 is out of range: at least 0"),
    ],
)
def test_values_out_of_range_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as info:
        train_parser().parse_args(arguments)
    assert info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1

    assert re.search(message, error)


def test_one_line_takes_the_cause_from_a_workers_traceback():
    error = ValueError("Caught MediaError in worker 0.\nTraceback:\n ...\nMediaError: a.mp4: empty")
    assert one_line(error) == "a.mp4: empty"
    assert one_line(ValueError("just this")) == "just this"
