"""Trains a SentencePiece model and writes its units file, from text or from label lists."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

MODEL_TYPES = ("unigram", "bpe")
LINE_END = re.compile("\r\n|\r|\n")  # not U+2028 and the like, which are text
# A seed piece's count before the first pass; characters count as they occur. With a low one the
# characters win, and training drops the seed.
SEED_FREQUENCY = 1_000_000
SEED_FILE = "seeds.tsv"
LONGEST_SENTENCE = 1 << 20  # bytes; SentencePiece drops longer ones without a word


def train_tokenizer(
    sentences: Iterable[str],
    prefix: str | os.PathLike[str],
    *,
    vocab_size: int,
    model_type: str = "unigram",
    seed_pieces: Sequence[str] | None = None,
) -> dict[str, int]:
    """Train a SentencePiece model and write PREFIX.model and PREFIX_units.txt.

    The units file has one line `piece id` for each piece that text can give, ids counted from 1 and
    `<unk>` first. Equal input gives equal bytes.

    Args:
        sentences: Training text; blank ones are left out.
        prefix: Path of the files to write, without their endings; the folder is made if needed.
        vocab_size: Number of pieces, `<unk>`, `<s>` and `</s>` included.
        model_type: "unigram" or "bpe".
        seed_pieces: Pieces that a unigram model starts from instead of frequent substrings, as they
            stand in a model (`▁word`). All characters of the text are added by themselves.

    Returns:
        The id of each piece in the units file.

    Raises:
        ValueError: The model type is unknown or does not take seed pieces, there is no text, or
            the vocabulary is too small or too large for the text.
    """
    import sentencepiece

    from datamodule.text_transform import output_pieces

    if model_type not in MODEL_TYPES:
        raise ValueError(f"model type is {model_type!r}, expected one of {', '.join(MODEL_TYPES)}")
    if seed_pieces is not None and model_type != "unigram":
        raise ValueError(f"seed pieces were given for {model_type}: only unigram starts from them")
    sentences = [sentence.strip() for sentence in sentences if sentence.strip()]
    if not sentences:
        raise ValueError("there is no text to train a tokenizer on: give at least one sentence")
    options = {}
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        if seed_pieces is not None:
            lines = "".join(f"{piece}\t{SEED_FREQUENCY}\n" for piece in seed_pieces)
            (Path(folder) / SEED_FILE).write_text(lines, encoding="utf-8")
            options["seed_sentencepieces_file"] = SEED_FILE
        here = os.getcwd()
        os.chdir(folder)  # the model records the seed file's path: it must not vary
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=1.0,
                max_sentence_length=LONGEST_SENTENCE,
                num_threads=1,
                minloglevel=2,
                **options,
            )
        except (RuntimeError, OSError) as error:
            cause = str(error).rpartition("] ")[2].strip() or "SentencePiece gives no reason"
            raise ValueError(f"cannot train with a vocabulary of {vocab_size}: {cause}") from error
        finally:
            os.chdir(here)
    pieces = output_pieces(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    units = {piece: number for number, piece in enumerate(pieces, start=1)}
    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.model").write_bytes(model.getvalue())
    lines = "".join(f"{piece} {index}\n" for piece, index in units.items())
    Path(f"{prefix}_units.txt").write_text(lines, encoding="utf-8", newline="\n")
    return units


def read_sentences(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Read the lines that are not blank of UTF-8 text files with one sentence a line.

    Raises:
        ValueError: A file cannot be read or is not UTF-8.
    """
    return [text for path in paths for text in _lines(path)]


def read_label_sentences(
    paths: Sequence[str | os.PathLike[str]], label_format: str = "auto"
) -> list[str]:
    """Read the text of label lists, rows of `dataset,relative/path.mp4,number of frames,text`.

    Args:
        paths: The lists, which are read as train.py reads them.
        label_format: `text` if last fields that are all numbers are transcripts; `auto` refuses
            them.

    Raises:
        ValueError: A file cannot be read or is not UTF-8, a row is malformed, or the last fields
            of a list look like token ids.
    """
    from datamodule.label_list import LabelList

    sentences = []
    for path in paths:
        labels = LabelList("", os.path.abspath(path))
        if not labels.has_labels:
            raise ValueError(f"{path}: the rows have no last field, expected their transcripts")
        if label_format == "auto" and not labels.is_text.any():
            raise ValueError(
                f"{path}: the last field holds token ids, expected plain text: train on the "
                "transcripts with --text, or give --label-format text if they are digits"
            )
        sentences.extend(labels.text(index) for index in range(len(labels)))
    return sentences


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when the files are written."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodule.train_tokenizer",
        description="Train a SentencePiece model; writes PREFIX.model and PREFIX_units.txt.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="FILE", help="text, one sentence a line")
    source.add_argument(
        "--labels", nargs="+", metavar="LIST", help="label lists with plain text in the last field"
    )
    parser.add_argument(
        "--label-format",
        choices=("auto", "text"),
        default="auto",
        help="text: last fields that are all numbers are transcripts, not token ids",
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="unigram")
    parser.add_argument("--output", required=True, metavar="PREFIX")
    options = parser.parse_args(arguments)
    try:
        sentences = (
            read_sentences(options.text)
            if options.text
            else read_label_sentences(options.labels, options.label_format)
        )
        units = train_tokenizer(
            sentences,
            options.output,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"{options.output}.model and {options.output}_units.txt: {len(units)} units")
    return 0


def _lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the lines of a file that are not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: convert the file first") from error
    return [line.strip() for line in LINE_END.split(text) if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
