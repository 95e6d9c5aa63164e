"""The options of the data."""

from dataclasses import dataclass
from typing import ClassVar

from espnet.option_tree import COUNT, NATURAL, option

DEFAULT_LIST = "lrs3_test_transcript_lengths_seg16s.csv"  # of auto_avsr
SOURCES = ("files",)
TRAINING = ("train",)
LABEL_FORMATS = ("auto", "ids", "text")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What data to read and how to batch it; each field is a flag of that name."""

    title: ClassVar[str] = "data"

    root_dir: str | None = option(None, "root of the data; label lists are in ROOT_DIR/labels")
    data_source: str = option("files", "what the clips of the lists are in", choices=SOURCES)
    train_file: str | None = option(None, "training label list", scripts=TRAINING)
    val_file: str = option(DEFAULT_LIST, "validation label list", scripts=TRAINING)
    test_file: str | None = option(
        None, f"test label list, scored after training (default: {DEFAULT_LIST} if it exists)"
    )
    label_format: str = option(
        "auto",
        "what the last fields of the lists hold; auto: token ids if they are numbers and beyond "
        "doubt ids of the vocabulary, else text",
        choices=LABEL_FORMATS,
    )
    train_num_buckets: int = option(
        400, "length classes from which batches are drawn", kind=COUNT, scripts=TRAINING
    )
    skip_bad_clips: bool = option(
        False,
        "leave out, log and count utterances that cannot be used instead of stopping; in scoring, "
        "leave them out of the error rates instead of counting them as empty hypotheses",
    )
    max_frames: int = option(
        1600, "video frames (25 a second) in a batch, padding included", kind=COUNT
    )
    decode_max_frames: int = option(
        1600,
        "frames, padding included, that are decoded at once; bounds the memory",
        kind=COUNT,
    )
    noise_file: tuple[str, ...] | None = option(
        None,
        "noise recordings, or folders of WAV files (default: babble mixed from the training "
        "utterances, or from the test list if there is no training list)",
        nargs="+",
        metavar="WAV",
    )
    sp_model_path: str | None = option(
        None,
        "SentencePiece model (default: ROOT_DIR/spm/unigram.model, else auto_avsr's "
        "spm/unigram/unigram5000.model beside this script)",
    )
    dict_path: str | None = option(
        None, "its units, a line 'piece id' each (default: MODEL_units.txt)"
    )
    crop_size: int = option(88, "side of the mouth crop", kind=COUNT)
    num_workers: int = option(2, "processes that read data", kind=NATURAL)
    seed: int = option(42, "of everything", kind=NATURAL)
