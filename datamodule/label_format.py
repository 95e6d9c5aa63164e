"""Tells what the last fields of a label list hold: token ids or plain text."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from datamodule.label_list import LabelList, shorten

if TYPE_CHECKING:
    from datamodule.av_dataset import Vocabulary

log = logging.getLogger(__name__)

SAMPLE = 200  # rows that are looked at closely
ENOUGH = 0.9  # of these rows, that the vocabulary must write with the very ids of the list
DIGITS = 10  # numbers below it are digits, which transcripts have too,
TWO_DIGITS = 1 / 3  # and so many of a list's numbers must be above
MANY_TOKENS = 20  # that decide where the numbers may be read in both ways


def holds_ids(labels: LabelList, label_format: str, vocabulary: Vocabulary) -> bool:
    """Whether the last fields are token ids; plain text if not.

    With `auto`, they are ids only if that is beyond doubt: all are whole numbers, ids of the
    vocabulary, that it would itself give for the text that they stand for, and more than digits.

    Args:
        labels: The list.
        label_format: `auto`, `ids` or `text`.
        vocabulary: That the ids belong to.

    Raises:
        ValueError: A row does not hold the ids that it should; the message names the line.
        ValueError: Numbers may be ids or transcripts.
    """
    numbers = np.flatnonzero(~labels.is_text & ~labels.is_empty)
    if label_format == "text" and len(numbers) == len(labels):
        if _are_ids(labels, numbers, vocabulary):
            log.warning("%s is read as text, but looks like token ids", labels.file)
    if label_format == "text" or not labels.has_labels:
        return False
    words = np.flatnonzero(labels.is_text)
    if label_format == "auto" and len(numbers) <= len(words):
        return False
    if label_format == "ids" or not len(words):
        _expect_numbers(labels, words)
        labels.check_token_ids(vocabulary.odim - 2)
        if label_format == "ids":
            return True
    sure = _are_ids(labels, numbers, vocabulary)
    if len(words):
        if sure:
            _expect_numbers(labels, words)
        return False
    if not sure:
        raise ValueError(
            f"{labels.where(numbers[0])}: got {shorten(labels.text(numbers[0]))}, and numbers in "
            "all other rows, which may be token ids or transcripts: give --label-format ids or text"
        )
    return True


def _expect_numbers(labels: LabelList, words: np.ndarray) -> None:
    """Refuse a list of ids in which some rows hold words."""
    if len(words):
        index = int(words[0])
        raise ValueError(
            f"{labels.where(index)}: got {shorten(labels.text(index))}, expected token ids "
            "separated by spaces like in most rows of this list; if it holds transcripts, give "
            "--label-format text"
        )


def _are_ids(labels: LabelList, numbers: np.ndarray, vocabulary: Vocabulary) -> bool:
    """Whether the rows `numbers` hold ids of the vocabulary beyond doubt."""
    if not vocabulary.takes_text:
        return True
    sample = numbers[np.linspace(0, len(numbers) - 1, min(SAMPLE, len(numbers)), dtype=np.int64)]
    texts = {" ".join(labels.text(index).split()) for index in sample}
    rows = [text.split() for text in texts]
    values = [int(word) for row in rows for word in row]
    if sum(value >= DIGITS for value in values) < TWO_DIGITS * len(values):
        return False
    if sum(_is_own(row, vocabulary) for row in rows) < ENOUGH * len(rows):
        return False
    readable = sum(vocabulary.post_process(vocabulary.tokenize(text)) == text for text in texts)
    return not readable or sum(len(row) for row in rows if len(row) > 1) >= MANY_TOKENS


def _is_own(row: list[str], vocabulary: Vocabulary) -> bool:
    """Whether the vocabulary gives these ids for the text that they stand for."""
    ids = [int(word) for word in row]
    if [str(index) for index in ids] != row or not 0 < min(ids) <= max(ids) < vocabulary.odim - 1:
        return False
    return vocabulary.tokenize(vocabulary.post_process(ids)).tolist() == ids
