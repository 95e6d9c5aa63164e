"""Tells how much of a label list's text the model's vocabulary cannot write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodule.label_list import shorten

if TYPE_CHECKING:
    from datamodule.av_dataset import AVDataset

SAMPLE = 2000  # rows that are looked at
MOST_UNKNOWN = 0.1  # of the tokens


def unknown_report(dataset: AVDataset) -> str | None:
    """What share of a list's tokens is unknown to the model, with an example.

    Returns:
        A sentence; None if all tokens of the rows that were looked at are known.

    Raises:
        ValueError: So many are unknown that the list must be of another vocabulary.
    """
    rows = np.linspace(0, len(dataset) - 1, min(SAMPLE, len(dataset)), dtype=np.int64).tolist()
    tokens, unknown, first = 0, 0, None
    for row in rows:
        lost, known = dataset.unknown(row)
        tokens, unknown = tokens + known + len(lost), unknown + len(lost)
        if lost and first is None:
            first = (row, lost[0])
    if first is None:
        return None
    row, part = first
    share = unknown / tokens
    report = (
        f"{dataset.labels.where(row)}: the model's vocabulary cannot write {shorten(part)}; "
        f"{share:.1%} of the tokens of this list are unknown to it"
    )
    if share <= MOST_UNKNOWN:
        return report
    raise ValueError(
        f"{report}, at most {MOST_UNKNOWN:.0%} are expected: give the vocabulary of these texts "
        "(--sp-model-path, or train one with python -m datamodule.train_tokenizer), or write the "
        "list in the letters of this one, upper or lower case too"
    )
