"""Types of command-line options: each parses a value and says what is expected of it."""

import math
from argparse import ArgumentTypeError


def count(text: str) -> int:
    """Parses a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{value} is out of range: at least 1 is expected")
    return value


def natural(text: str) -> int:
    """Parses a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise ArgumentTypeError(f"{value} is out of range: at least 0 is expected")
    return value


def positive(text: str) -> float:
    """Parses a number above 0."""
    value = float(text)
    if not value > 0:
        raise ArgumentTypeError(f"{value} is out of range: a number above 0 is expected")
    return value


def non_negative(text: str) -> float:
    """Parses a number of at least 0."""
    value = float(text)
    if not value >= 0:
        raise ArgumentTypeError(f"{value} is out of range: at least 0 is expected")
    return value


def margin(text: str) -> float:
    """Parses a number of seconds, of at least 0, which may end in `s`: `2`, `0.5s`, `30s`."""
    try:
        return non_negative(text.removesuffix("s"))
    except ValueError:
        raise ArgumentTypeError(f"{text} is no number of seconds: 2 or 30s, say") from None


def finite(text: str) -> float:
    """Parses a number that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise ArgumentTypeError(f"{value} is out of range: a finite number is expected")
    return value


def probability(text: str) -> float:
    """Parses a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{value} is out of range: a number in [0, 1] is expected")
    return value


def share(text: str) -> float:
    """Parses a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"{value} is out of range: a number in [0, 1) is expected")
    return value


def batches(text: str) -> int | float:
    """Parses a number of batches (`4`, `0`) or a share of them (`0.1`)."""
    return natural(text) if text.isdigit() else probability(text)


def hidden_layer(text: str) -> int | str:
    """Parses a number of a hidden layer from -1 on, or `weighted`."""
    if text == "weighted":
        return text
    try:
        value = int(text)
    except ValueError:
        value = -2
    if value < -1:
        raise ArgumentTypeError(f"{text} is no hidden layer: -1, a number from 0, or weighted")
    return value
