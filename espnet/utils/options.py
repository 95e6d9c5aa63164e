"""Every command-line option, in titled groups that the entry scripts compose.

Nothing here imports torch, so that `--help` and a mistaken option answer at once.
"""

from argparse import ArgumentParser, BooleanOptionalAction
from typing import NoReturn

from espnet.nets.decoders import DECODERS
from espnet.utils.model_options import (
    add_adaptation_options,
    add_decoder_options,
    add_encoder_options,
    add_model_options,
)
from espnet.utils.option_types import (
    batches,
    count,
    finite,
    natural,
    non_negative,
    positive,
    probability,
)
from espnet.utils.recipes import CLEAN_SNR, RECIPES
from espnet.utils.text_normalization import NORMALIZERS

DEFAULT_LIST = "lrs3_test_transcript_lengths_seg16s.csv"  # of auto_avsr
OPTIMIZERS = ("adamw", "adamw8bit")


class OneLineParser(ArgumentParser):
    """A parser whose errors are one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2.

        Args:
            message: What was got, what is expected, what to do.
        """
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_run_options(parser: ArgumentParser) -> None:
    """Adds where a training run is kept and how it is followed."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--demo",
        action="store_true",
        help="make the demo corpus and train, average and score a small audio-visual model on it",
    )
    group.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="options that were measured together, as defaults; with --demo, on the demo corpus",
    )
    group.add_argument("--exp-dir", default="./exp", help="folder of all runs (%(default)s)")
    group.add_argument("--exp-name", help="name of the run; its files are in EXP_DIR/EXP_NAME")
    group.add_argument("--group-name", help="group of the run in Weights & Biases")
    group.add_argument(
        "--logger",
        choices=("csv", "tensorboard", "wandb", "none"),
        default="tensorboard",
        help="where curves go beside metrics.csv, which is always written: csv and none mean "
        "nowhere else (%(default)s)",
    )
    group.add_argument(
        "--ckpt-path",
        metavar="PATH|last",
        help="checkpoint to resume from; 'last' is the run's own last.ckpt, if there is one",
    )
    group.add_argument(
        "--save-minutes",
        type=positive,
        default=30.0,
        metavar="N",
        help="minutes between two saves of last.ckpt in the middle of an epoch (%(default)g)",
    )
    group.add_argument(
        "--fast-dev-run",
        action="store_true",
        help="one training and one validation batch, no files",
    )
    group.add_argument(
        "--overfit-batches",
        type=batches,
        default=0,
        metavar="N",
        help="train and validate on N fixed batches, or on a share of them",
    )


def add_data_options(parser: ArgumentParser, *, training: bool) -> None:
    """Adds what data to read and how to batch it."""
    group = parser.add_argument_group("data")
    group.add_argument("--root-dir", help="root of the data; label lists are in ROOT_DIR/labels")
    if training:
        group.add_argument("--train-file", help="training label list")
        group.add_argument(
            "--val-file", default=DEFAULT_LIST, help="validation label list (%(default)s)"
        )
        group.add_argument(
            "--test-file",
            help=f"test label list, scored after training (default: {DEFAULT_LIST} if it exists)",
        )
        group.add_argument(
            "--train-num-buckets",
            type=count,
            default=400,
            help="length classes from which batches are drawn (%(default)s)",
        )
        group.add_argument(
            "--skip-bad-clips",
            action="store_true",
            help="count and log unreadable training clips instead of stopping",
        )
    else:
        group.add_argument("--test-file", default=DEFAULT_LIST, help="test list (%(default)s)")
    group.add_argument(
        "--max-frames",
        type=count,
        default=1600,
        help="video frames (25 a second) in a batch, padding included (%(default)s)",
    )
    group.add_argument(
        "--noise-file",
        nargs="+",
        metavar="WAV",
        help="noise recordings (default: babble mixed from the training utterances, or from the "
        "test list if there is no training list)",
    )
    group.add_argument(
        "--sp-model-path",
        help="SentencePiece model (default: ROOT_DIR/spm/unigram.model, else auto_avsr's "
        "spm/unigram/unigram5000.model beside this script)",
    )
    group.add_argument(
        "--dict-path", help="its units, a line 'piece id' each (default: MODEL_units.txt)"
    )
    group.add_argument(
        "--crop-size", type=count, default=88, help="side of the mouth crop (%(default)s)"
    )
    group.add_argument(
        "--num-workers", type=natural, default=2, help="processes that read data (%(default)s)"
    )
    group.add_argument("--seed", type=natural, default=42, help="of everything (%(default)s)")


def add_optimiser_options(parser: ArgumentParser) -> None:
    """Adds how to train."""
    group = parser.add_argument_group("training")
    group.add_argument("--pretrained-model-path", help="checkpoint whose weights to start from")
    group.add_argument(
        "--transfer-frontend", action="store_true", help="take only its front-end's weights"
    )
    group.add_argument(
        "--transfer-encoder", action="store_true", help="take only its encoder's weights"
    )
    group.add_argument("--max-epochs", type=count, default=75, help="(%(default)s)")
    group.add_argument(
        "--warmup-epochs", type=non_negative, default=5, help="of rising rate (%(default)s)"
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="adamw8bit: moments in 8 bits, by bitsandbytes (%(default)s)",
    )
    group.add_argument("--lr", type=positive, default=1e-3, help="highest rate (%(default)s)")
    group.add_argument(
        "--lr-pretrained",
        type=positive,
        help="highest rate of adapters and of pretrained parts that are trained (default: --lr)",
    )
    group.add_argument(
        "--weight-decay",
        type=non_negative,
        default=0.03,
        help="of weights, not of norms, biases and gates (%(default)s)",
    )
    group.add_argument(
        "--average-epochs",
        type=count,
        default=10,
        help="last epochs that are kept, and averaged into model_avg_N.pth (%(default)s)",
    )
    group.add_argument(
        "--accumulate-grad-batches", type=count, default=1, help="batches a step (%(default)s)"
    )
    group.add_argument(
        "--probe-batch",
        action="store_true",
        help="try the largest batches first, and tell the memory that they take",
    )


def add_hardware_options(parser: ArgumentParser) -> None:
    """Adds what to run on."""
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--accelerator", default="auto", choices=("auto", "cpu", "gpu", "cuda"), help="(auto)"
    )
    group.add_argument(
        "--gpus",
        type=count,
        help="devices of each node, or processes on CPUs (default: every GPU, one process on CPU)",
    )
    group.add_argument("--num-nodes", type=count, default=1, help="machines (%(default)s)")
    group.add_argument(
        "--strategy", default="auto", help="Lightning's: auto, ddp, fsdp, deepspeed, ... (auto)"
    )
    group.add_argument(
        "--precision",
        help="Lightning's: 32-true, 16-mixed, bf16-mixed, ... (default: bf16-mixed on a GPU that "
        "has it, else 32-true)",
    )
    group.add_argument("--slurm-job-id", type=float, help="kept with the run; not needed")
    group.add_argument("--debug", action="store_true", help="log at debug level")


def add_decoding_options(parser: ArgumentParser) -> None:
    """Adds how to search for the transcript."""
    group = parser.add_argument_group("decoding")
    sizes = [f"{name}: {choice.beam_size}" for name, choice in DECODERS.items()]
    group.add_argument(
        "--beam-size",
        type=count,
        help=f"hypotheses that are kept (default: {', '.join(sizes)})",
    )
    group.add_argument(
        "--ctc-decode-weight",
        type=probability,
        help="CTC's share (default: 0.1, but 0 for a model without CTC)",
    )
    group.add_argument(
        "--length-bonus", type=finite, default=0.0, help="score of every token (%(default)s)"
    )
    group.add_argument(
        "--length-normalization",
        action=BooleanOptionalAction,
        default=False,
        help="compare hypotheses by their score per token, and end the search as transformers' "
        "generate does (%(default)s)",
    )
    group.add_argument(
        "--stop-repeats",
        action=BooleanOptionalAction,
        help="stop hypotheses that have begun to repeat themselves (default: for pretrained "
        "decoders that are searched without CTC)",
    )
    group.add_argument(
        "--max-dec-tokens",
        type=count,
        metavar="N",
        help="most tokens of a transcript (default: as many as frames)",
    )
    group.add_argument(
        "--decode-max-frames",
        type=count,
        default=1600,
        help="frames, padding included, that are decoded at once; bounds the memory (%(default)s)",
    )
    group.add_argument(
        "--decode-snr-target",
        type=finite,
        nargs="+",
        default=[CLEAN_SNR],
        metavar="DB",
        help=f"signal-to-noise ratios to score at; {CLEAN_SNR:.0f} is clean (the default)",
    )
    group.add_argument(
        "--normalize",
        choices=NORMALIZERS,
        default="none",
        help="what references and hypotheses go through before errors are counted: Whisper's "
        "normalisers for all languages (basic) or for English (whisper) (%(default)s)",
    )


def train_parser() -> ArgumentParser:
    """Returns the parser of train.py."""
    parser = OneLineParser(description="Train an audio-visual speech recogniser.")
    add_run_options(parser)
    add_data_options(parser, training=True)
    add_encoder_options(parser)
    add_model_options(parser)
    add_decoder_options(parser)
    add_adaptation_options(parser)
    add_optimiser_options(parser)
    add_decoding_options(parser)
    add_hardware_options(parser)
    return parser


def eval_parser() -> ArgumentParser:
    """Returns the parser of eval.py."""
    parser = OneLineParser(description="Score a speech recogniser on a test list.")
    group = parser.add_argument_group("checkpoint and results")
    group.add_argument(
        "--pretrained-model-path",
        help="checkpoint; the config.yaml beside it gives the model's options (a published "
        "Whisper, --audio-encoder whisper --decoder whisper, is scored without)",
    )
    group.add_argument(
        "--output-dir",
        help="folder of hypotheses and summary (default: beside the checkpoint, if there is one)",
    )
    add_data_options(parser, training=False)
    add_encoder_options(parser)
    add_model_options(parser)
    add_decoder_options(parser)
    add_adaptation_options(parser)
    add_decoding_options(parser)
    add_hardware_options(parser)
    return parser


def one_line(error: Exception) -> str:
    """The last line of an error: what a data-loading process adds before it is its traceback."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].split("Error: ", maxsplit=1)[-1]
