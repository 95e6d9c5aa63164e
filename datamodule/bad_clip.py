"""Utterances of a list that cannot be used, and what stands in their way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What differs between clips that have the same trouble.
VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?")


@dataclass(frozen=True)
class BadClip:
    """Stands for an utterance that is left out."""

    index: int  # row of the utterance in its label list
    where: str  # its file, or its line in the list
    cause: str  # one line

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}"


def by_cause(clips: Iterable[BadClip]) -> str:
    """Sum up clips by their cause, the most frequent first, each with one of them as example."""
    groups: dict[str, list[BadClip]] = {}
    for clip in sorted(clips, key=lambda clip: clip.index):
        groups.setdefault(VARYING.sub("#", clip.cause), []).append(clip)
    number = sum(map(len, groups.values()))
    causes = [
        f"{len(group)} as {group[0]}" for group in sorted(groups.values(), key=len, reverse=True)
    ]
    return f"{number} clip{'s' * (number != 1)}: {'; '.join(causes)}"
