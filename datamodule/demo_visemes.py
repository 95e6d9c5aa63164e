"""Turns timed phonemes into the shape of a mouth over time: visemes, co-articulation, noise."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from datamodule.demo_speech import Phoneme
from espnet.formats import VIDEO_RATE

# How hard the video is to read. Larger values make it harder.
TIMING_JITTER_S = 0.015  # spread of a phoneme's shift against the sound, seconds
SHAPE_NOISE = 0.045  # spread of a phoneme's shape around its viseme's, 1 being a wide-open mouth
SHAPE_WOBBLE = 0.035  # slow drift of the shape within an utterance, the same unit
COARTICULATION_S = 0.035  # how far a phoneme reaches into its neighbours, seconds
MUMBLING = 0.25  # how much less than the full movement the laziest speaker makes

WOBBLE_RATE_HZ = 2.0


class Shape(NamedTuple):
    """What is seen of a mouth."""

    # Height of the opening, 0 closed to 1 wide; negative presses the lips together.
    opening: float = 0.0
    width: float = 0.0  # -1 narrow to 1 spread
    rounding: float = 0.0  # 0 flat to 1 pursed
    press: float = 0.0  # 0 full lips to 1 rolled in
    tuck: float = 0.0  # 0 free to 1 lower lip under the upper teeth
    teeth: float = 0.0  # 0 hidden to 1 upper teeth shown
    tongue: float = 0.0  # 0 low to 1 tip between the teeth


class Viseme(NamedTuple):
    """A shape, and how strongly it asserts itself against its neighbours."""

    shape: Shape
    strength: float


REST = Viseme(Shape(opening=0.03), 1.0)
LIPS = Viseme(Shape(opening=-0.12, press=0.6), 6.0)
LIP_TEETH = Viseme(Shape(opening=0.12, tuck=1.0, teeth=0.6), 4.0)
TONGUE_TEETH = Viseme(Shape(opening=0.24, width=0.1, teeth=0.6, tongue=0.8), 1.8)
TONGUE_RIDGE = Viseme(Shape(opening=0.20, width=0.15, teeth=0.7, tongue=0.4), 1.5)
TONGUE_BACK = Viseme(Shape(opening=0.28, width=0.05, teeth=0.4, tongue=0.1), 0.5)
PALATE = Viseme(Shape(opening=0.24, width=-0.3, rounding=0.5, teeth=0.7, tongue=0.2), 2.2)
LIQUID = Viseme(Shape(opening=0.24, width=-0.2, rounding=0.4, teeth=0.3, tongue=0.2), 1.5)
GLIDE = Viseme(Shape(opening=0.10, width=-0.7, rounding=1.0), 4.0)
SPREAD = Viseme(Shape(opening=0.28, width=0.5, teeth=0.7, tongue=0.3), 2.0)
MIDDLE = Viseme(Shape(opening=0.48, width=0.3, teeth=0.6, tongue=0.3), 2.0)
OPEN = Viseme(Shape(opening=0.80, width=0.15, teeth=0.5, tongue=0.2), 2.2)
NEUTRAL = Viseme(Shape(opening=0.38, teeth=0.4, tongue=0.2), 1.2)
ROUND_OPEN = Viseme(Shape(opening=0.58, width=-0.35, rounding=0.5, teeth=0.2, tongue=0.1), 2.2)
ROUND_CLOSE = Viseme(Shape(opening=0.16, width=-0.65, rounding=0.9), 3.0)

# espeak-ng's mnemonics; those of one row cannot be told apart by eye. A diphthong is two visemes.
_GROUPS: tuple[tuple[str, tuple[Viseme, ...]], ...] = (
    ("p b m", (LIPS,)),
    ("f v", (LIP_TEETH,)),
    ("T D", (TONGUE_TEETH,)),
    ("t d n s z l", (TONGUE_RIDGE,)),
    ("k g N h x", (TONGUE_BACK,)),
    ("tS dZ S Z", (PALATE,)),
    ("r", (LIQUID,)),
    ("w", (GLIDE,)),
    ("i I j ;", (SPREAD,)),
    ("E e 3", (MIDDLE,)),
    ("a A A@", (OPEN,)),
    ("@ a# V", (NEUTRAL,)),
    ("0 O o", (ROUND_OPEN,)),
    ("u U", (ROUND_CLOSE,)),
    ("eI", (MIDDLE, SPREAD)),
    ("aI", (OPEN, SPREAD)),
    ("aU", (OPEN, ROUND_CLOSE)),
    ("oU", (ROUND_OPEN, ROUND_CLOSE)),
    ("i@", (SPREAD, NEUTRAL)),
    ("o@ O@", (ROUND_OPEN, NEUTRAL)),
)
PHONEME_VISEMES = {name: visemes for names, visemes in _GROUPS for name in names.split()}


def visemes_of(phoneme: str) -> tuple[Viseme, ...]:
    """Look up what is seen of a phoneme, a mnemonic without stress marks.

    One that is not in the table is taken for the longest one there with which it begins (`aI2` for
    `aI`, `i:` for `i`).

    Returns:
        One viseme, or two in order; a neutral mouth where nothing fits.
    """
    for end in range(len(phoneme), 0, -1):
        if phoneme[:end] in PHONEME_VISEMES:
            return PHONEME_VISEMES[phoneme[:end]]
    return (NEUTRAL,)


def shape_track(
    phonemes: list[Phoneme], num_frames: int, *, clarity: float, random: np.random.Generator
) -> np.ndarray:
    """Draw the course of the mouth's shape.

    Every viseme pulls the shape towards itself, with a strength that falls off exponentially
    outside the core of its phoneme; the shape is the weighted mean. Source: M. Cohen and
    D. Massaro, "Modeling coarticulation in synthetic visual speech" (1993); here all features of a
    viseme share one strength.

    Args:
        phonemes: Phonemes in order, with times in seconds from the first frame.
        num_frames: Number of frames T, at 25 per second.
        clarity: How fully the speaker articulates, 0 (not at all) to 1.
        random: Source of jitter and noise.

    Returns:
        float32 (T, F), the fields of `Shape` in order.
    """
    times = (np.arange(num_frames) + 0.5) / VIDEO_RATE
    segments = [(REST, -1.0, phonemes[0].start - 2 * COARTICULATION_S)]
    for phoneme in phonemes:
        visemes = visemes_of(phoneme.name)
        shift = random.normal(0.0, TIMING_JITTER_S)
        edges = np.linspace(phoneme.start, phoneme.end, len(visemes) + 1) + shift
        segments.extend(zip(visemes, edges[:-1], edges[1:], strict=True))
    segments.append((REST, phonemes[-1].end + 2 * COARTICULATION_S, times[-1] + 1.0))

    shapes = np.array([viseme.shape for viseme, _, _ in segments])  # (N, F)
    shapes[1:-1] += random.normal(0.0, SHAPE_NOISE, shapes[1:-1].shape)
    strengths = np.array([viseme.strength for viseme, _, _ in segments])
    starts, ends = np.array([segment[1:] for segment in segments]).T
    quarter = (ends - starts) / 4  # the core is the middle half
    distance = np.abs(times[:, None] - (starts + ends) / 2) - quarter  # (T, N)
    pull = strengths * np.exp(-np.maximum(distance, 0.0) / COARTICULATION_S)
    track = pull @ shapes / pull.sum(axis=1, keepdims=True)  # (T, N) (N, F) -> (T, F)

    rest = np.array(REST.shape)
    track = rest + (track - rest) * (1.0 - MUMBLING * (1.0 - clarity))
    for feature in range(track.shape[1]):
        track[:, feature] += SHAPE_WOBBLE * smooth_noise(num_frames, WOBBLE_RATE_HZ, random)
    return track.astype(np.float32)


def smooth_noise(num_frames: int, rate_hz: float, random: np.random.Generator) -> np.ndarray:
    """Draw a slow random course: float64 (T,) of mean 0 and variance 1, at 25 frames per second.

    It is the sum of three sines of frequencies up to `rate_hz`.
    """
    times = np.arange(num_frames) / VIDEO_RATE
    frequencies = random.uniform(0.2, 1.0, 3) * rate_hz
    phases = random.uniform(0.0, 2 * np.pi, 3)
    waves = np.sin(2 * np.pi * frequencies * times[:, None] + phases)  # (T, 3)
    return waves.sum(axis=1) * np.sqrt(2 / 3)
