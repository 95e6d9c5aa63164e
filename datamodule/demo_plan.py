"""Draws who says what in the demo corpus: sentences of the GRID grammar, speakers and their split.

Source: the grammar of M. Cooke et al., "An audio-visual corpus for speech perception and automatic
speech recognition" (2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from datamodule.demo_speech import Voice

GRAMMAR = tuple(
    tuple(words.split())
    for words in (
        "bin lay place set",
        "blue green red white",
        "at by in with",
        "a b c d e f g h i j k l m n o p q r s t u v x y z",
        "zero one two three four five six seven eight nine",
        "again now please soon",
    )
)
LETTERS = GRAMMAR[3]
NUM_SENTENCES = math.prod(len(words) for words in GRAMMAR)

ACCENTS = (
    "en",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-us",
    "en-029",
)
VARIANTS = tuple("m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 linda belinda".split())
SPLITS = ("train", "val", "test")
NUM_SPEAKERS = {"train": 40, "val": 4, "test": 8}
SENTENCES_PER_SPEAKER = 4  # at least, so that a small corpus has few speakers

PITCHES = (38, 62)
PITCH_RANGES = (35, 65)
RATES = (160, 195)  # words per minute


@dataclass(frozen=True)
class Speaker:
    """A speaker and all that he or she says, in order."""

    name: str  # unique, such as "s01"
    split: str  # "train", "val" or "test"
    voice: Voice  # how the speaker sounds
    seed: tuple[int, ...]  # seeds of everything else that is drawn for the speaker
    sentences: tuple[str, ...]  # transcripts, lower case

    def utterance_names(self) -> list[str]:
        """Name the speaker's sentences, in order: paths below the dataset without an ending."""
        folder = f"{self.split}/{self.name}"
        return [f"{folder}/{self.name}_{index:04d}" for index in range(len(self.sentences))]


def draw_speakers(counts: dict[str, int], seed: int) -> list[Speaker]:
    """Draw the speakers with their sentences, as many as `counts` has for each split.

    No sentence occurs twice, and no two speakers share both accent and voice variant.

    Raises:
        ValueError: A count is below 1, or the grammar has not enough sentences.
    """
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"got {count} {split} sentences, expected at least 1")
    if sum(counts.values()) > NUM_SENTENCES:
        raise ValueError(
            f"got {sum(counts.values())} sentences, expected at most {NUM_SENTENCES}, "
            "which is all that the grammar has: ask for fewer"
        )
    random = np.random.default_rng([seed, 0])
    numbers = iter(random.choice(NUM_SENTENCES, sum(counts.values()), replace=False))
    voices = iter(_draw_voices(random))
    speakers = []
    for split in SPLITS:
        num_speakers = min(NUM_SPEAKERS[split], max(1, counts[split] // SENTENCES_PER_SPEAKER))
        for part in np.array_split(np.arange(counts[split]), num_speakers):
            index = len(speakers) + 1
            speakers.append(
                Speaker(
                    name=f"s{index:02d}",
                    split=split,
                    voice=next(voices),
                    seed=(seed, index),
                    sentences=tuple(_sentence(next(numbers)) for _ in part),
                )
            )
    return speakers


def spoken_text(sentence: str) -> str:
    """Write a sentence so that espeak-ng spells its letter instead of taking it for a word."""
    words = [word.upper() if word in LETTERS else word for word in sentence.split()]
    return " ".join("[[eI]]" if word == "A" else word for word in words)


def _sentence(number: int) -> str:
    """Give the sentence of a number below NUM_SENTENCES."""
    places = np.unravel_index(number, [len(words) for words in GRAMMAR])
    return " ".join(words[place] for words, place in zip(GRAMMAR, places, strict=True))


def _draw_voices(random: np.random.Generator) -> list[Voice]:
    """Draw a voice for each speaker; variants take turns, each time with another accent."""
    accents = {variant: list(random.permutation(ACCENTS)) for variant in VARIANTS}
    variants = list(random.permutation(VARIANTS))
    return [
        Voice(
            accent=str(accents[variants[index % len(variants)]].pop()),
            variant=str(variants[index % len(variants)]),
            pitch=int(random.integers(*PITCHES, endpoint=True)),
            pitch_range=int(random.integers(*PITCH_RANGES, endpoint=True)),
            rate=int(random.integers(*RATES, endpoint=True)),
        )
        for index in range(sum(NUM_SPEAKERS.values()))
    ]
