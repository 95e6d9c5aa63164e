"""Every option of the entry scripts: the tree, and its parsers.

Nothing here imports torch, so that `--help` and a mistaken option answer at once.
"""

import os
from argparse import ArgumentParser
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NoReturn

from datamodule.options import DEFAULT_LIST, DataOptions
from espnet.formats import CLEAN_SNR
from espnet.nets.model_options import ModelOptions
from espnet.nets.search_options import SearchOptions
from espnet.option_tree import (
    COUNT,
    FINITE,
    NATURAL,
    NON_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    add_arguments,
    branch,
    option,
)
from espnet.utils.recipes import RECIPES
from espnet.utils.text_normalization import NORMALIZERS

BAD_CLIPS_CODE = 3  # that a process ends with if error rates suffer from clips without a hypothesis
OPTIMIZERS = ("adamw", "adamw8bit")
of_training = partial(option, scripts=("train",))


class OneLineParser(ArgumentParser):
    """A parser whose errors are one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2.

        Args:
            message: What was got, what is expected, what to do.
        """
        self.exit(2, f"{self.prog}: error: {message}\n")


def batches(text: str) -> int | float:
    """Parses a number of batches (`4`, `0`) or a share of them (`0.1`)."""
    return NATURAL(text) if text.isdigit() else PROBABILITY(text)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a training run is kept and how it is followed; each field is a flag of that name."""

    title: ClassVar[str] = "run"

    demo: bool = of_training(
        False,
        "make the demo corpus and train, average and score a small audio-visual model on it",
    )
    recipe: str | None = of_training(
        None,
        "options that were measured together, as defaults; with --demo, on the demo corpus",
        choices=tuple(RECIPES),
    )
    exp_dir: str = of_training("./exp", "folder of all runs")
    exp_name: str | None = of_training(None, "name of the run; its files are in EXP_DIR/EXP_NAME")
    group_name: str | None = of_training(None, "group of the run in Weights & Biases")
    logger: str = of_training(
        "tensorboard",
        "where curves go beside metrics.csv, which is always written: csv and none mean nowhere "
        "else",
        choices=("csv", "tensorboard", "wandb", "none"),
    )
    ckpt_path: str | None = of_training(
        None,
        "checkpoint to resume from; 'last' is the run's own last.ckpt, if there is one",
        metavar="PATH|last",
    )
    save_minutes: float = of_training(
        30.0,
        "minutes between two saves of last.ckpt in the middle of an epoch",
        kind=POSITIVE,
        metavar="N",
    )
    fast_dev_run: bool = of_training(False, "one training and one validation batch, no files")
    overfit_batches: int | float = of_training(
        0,
        "train and validate on N fixed batches, or on a share of them (default: 0, all)",
        kind=batches,
        metavar="N",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train; each field is a flag of that name."""

    title: ClassVar[str] = "training"

    pretrained_model_path: str | None = option(
        None,
        "checkpoint: train.py starts from its weights, eval.py scores it, with the options in the "
        "config.yaml beside it (without, eval.py scores a published Whisper, --audio-encoder "
        "whisper --decoder whisper)",
    )
    transfer_frontend: bool = of_training(False, "take only its front-end's weights")
    transfer_encoder: bool = of_training(
        False, "take only its encoder's weights, with the projection before it where it fits"
    )
    transfer_all: bool = of_training(
        False, "take all that it has but the layers of the vocabulary, which may be another one"
    )
    max_epochs: int = of_training(75, kind=COUNT)
    warmup_epochs: float = of_training(5.0, "of rising rate", kind=NON_NEGATIVE)
    ctc_first_epochs: int = of_training(
        0,
        "epochs at the start in which CTC is trained alone, without the decoder",
        kind=NATURAL,
        metavar="N",
    )
    optimizer: str = of_training(
        "adamw", "adamw8bit: moments in 8 bits, by bitsandbytes", choices=OPTIMIZERS
    )
    lr: float = of_training(1e-3, "highest rate", kind=POSITIVE)
    lr_pretrained: float | None = of_training(
        None,
        "highest rate of adapters and of pretrained parts that are trained (default: --lr)",
        kind=POSITIVE,
    )
    weight_decay: float = of_training(
        0.03, "of weights, not of norms, biases and gates", kind=NON_NEGATIVE
    )
    average_epochs: int = of_training(
        10, "last epochs that are kept, and averaged into model_avg_N.pth", kind=COUNT
    )
    accumulate_grad_batches: int = of_training(1, "batches a step", kind=COUNT)
    probe_batch: bool = of_training(
        False, "try the largest batches first, and tell the memory that they take"
    )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """What is scored, and how errors are counted; each field is a flag of that name."""

    title: ClassVar[str] = "decoding"

    decode_snr_target: tuple[float, ...] = option(
        (CLEAN_SNR,),
        f"signal-to-noise ratios to score at; {CLEAN_SNR:.0f} is clean (the default)",
        kind=FINITE,
        nargs="+",
        metavar="DB",
    )
    normalize: str = option(
        "none",
        "what references and hypotheses go through before errors are counted: Whisper's "
        "normalisers for all languages (basic) or for English (whisper)",
        choices=NORMALIZERS,
    )
    output_dir: str | None = option(
        None,
        "folder of hypotheses and summary (default: beside the checkpoint, if there is one)",
        scripts=("eval",),
    )
    resume: bool = option(
        False,
        "go on with the hypotheses that a scoring which was cut short has left",
        scripts=("eval",),
    )


@dataclass(frozen=True, kw_only=True)
class HardwareOptions:
    """What to run on; each field is a flag of that name."""

    title: ClassVar[str] = "hardware"

    accelerator: str = option("auto", choices=("auto", "cpu", "gpu", "cuda"))
    gpus: int | None = option(
        None,
        "devices of each node, or processes on CPUs (default: every GPU, one process on CPU)",
        kind=COUNT,
    )
    num_nodes: int = option(1, "machines", kind=COUNT)
    strategy: str = option("auto", "Lightning's: auto, ddp, fsdp, deepspeed, ...")
    precision: str | None = option(
        None,
        "Lightning's: 32-true, 16-mixed, bf16-mixed, ... (default: bf16-mixed on a GPU that has "
        "it, else 32-true)",
    )
    slurm_job_id: float | None = option(None, "kept with the run; not needed", kind=float)
    debug: bool = option(False, "log at debug level")


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of a run."""

    run: RunOptions = branch(RunOptions)
    data: DataOptions = branch(DataOptions)
    model: ModelOptions = branch(ModelOptions)
    training: TrainingOptions = branch(TrainingOptions)
    search: SearchOptions = branch(SearchOptions)
    scoring: ScoringOptions = branch(ScoringOptions)
    hardware: HardwareOptions = branch(HardwareOptions)


def hide_gpus(options: HardwareOptions) -> None:
    """Makes a run on CPUs see no GPU, whatever asks for one; before torch looks for them."""
    if options.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def train_parser() -> ArgumentParser:
    """Returns the parser of train.py."""
    parser = OneLineParser(description="Train an audio-visual speech recogniser.")
    add_arguments(parser, Options, "train")
    return parser


def eval_parser() -> ArgumentParser:
    """Returns the parser of eval.py."""
    parser = OneLineParser(description="Score a speech recogniser on a test list.")
    add_arguments(parser, Options, "eval")
    parser.set_defaults(test_file=DEFAULT_LIST)
    return parser
