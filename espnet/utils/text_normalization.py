"""Normalisers that make reference and hypothesis alike before word errors are counted."""

from collections.abc import Callable
from functools import partial

NORMALIZERS = ("none", "basic", "whisper")


def normalizer(name: str) -> Callable[[str], str]:
    """Looks up a normaliser of text by its name.

    - `none` leaves text as it is.
    - `basic` is that of the Whisper paper for all languages: lower case, no punctuation and no
      symbols, nothing in brackets.
    - `whisper` is that for English: moreover, contractions and titles are written out, numbers are
      written in digits, fillers and diacritics are left out. British spelling is kept: the list
      of spellings comes with the checkpoints of Whisper, not with transformers.

    Returns:
        A function of the text, which leaves no space around it unless it is `none`.

    Raises:
        ValueError: If there is no normaliser of that name.
    """
    if name not in NORMALIZERS:
        raise ValueError(f"got normalizer {name!r}, expected one of {', '.join(NORMALIZERS)}")
    if name == "none":
        return str
    # Imported here, so that evaluation without normalisation does without transformers.
    from transformers.models.whisper.english_normalizer import (
        BasicTextNormalizer,
        EnglishTextNormalizer,
    )

    normalize = BasicTextNormalizer() if name == "basic" else EnglishTextNormalizer({})
    return partial(_stripped, normalize)  # It pickles, unlike a lambda.


def _stripped(normalize: Callable[[str], str], text: str) -> str:
    """Normalises a text and cuts off the space that is left where punctuation was."""
    return normalize(text).strip()
