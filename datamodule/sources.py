"""Where the streams of a list's utterances come from."""

from __future__ import annotations

import os
from itertools import islice
from typing import Protocol

import torch

from datamodule.label_list import LabelList
from datamodule.media import (
    MediaError,
    audio_start,
    code_points,
    find_audio,
    find_file,
    read_audio,
    read_video,
    wav_beside,
)
from datamodule.options import SOURCES, DataOptions

MOST_LISTED = 8  # entries of a folder for each file that is looked for in it


class Source(Protocol):
    """Gives the streams of an utterance by its path, as `LabelList.path` has it.

    Its methods raise a `MediaError` that names the clip if it is not there or cannot be read.
    """

    def check(self, labels: LabelList, *, with_video: bool) -> None:
        """Refuse a list whose clips are missing, before anything of them is read."""

    def video(self, path: str) -> torch.Tensor:
        """Return the frames, uint8 (T, H, W), 25 a second."""

    def audio(self, path: str) -> torch.Tensor:
        """Return the samples, float32 (S,), at 16 kHz; the first is at the time of frame 0."""

    def audio_start(self, path: str) -> int:
        """Tell by how many samples the sound itself starts after frame 0, negative if before."""


def build_source(options: DataOptions) -> Source:
    """Make the source that the options name.

    Raises:
        ValueError: There is none of the name.
    """
    name = options.data_source
    if name == "files":
        return FileSource()
    raise ValueError(f"data source {name!r} is unknown: choose one of {', '.join(SOURCES)}")


class FileSource:
    """Media files in the folders that the list names; sound is in the WAV beside the video."""

    def check(self, labels: LabelList, *, with_video: bool) -> None:
        """See `Source`; what is in the files is seen when they are read.

        Folders are listed, which takes much less time than to ask for their files one by one; that
        is left for the files that were not seen.
        """
        unseen: list[int] = []
        for folder, indices, names in labels.folders():
            seen = _files_in(folder, limit=MOST_LISTED * len(names))
            for index, name in zip(indices.tolist(), names, strict=True):
                if name not in seen and (with_video or wav_beside(name) not in seen):
                    unseen.append(index)
        for index in sorted(unseen):
            path = labels.path(index) if with_video else find_audio(labels.path(index))
            if not os.path.isfile(find_file(path) or path):
                cause = f"it does not exist, but {labels.where(index)} names it{code_points(path)}"
                raise MediaError(path, cause)

    def video(self, path: str) -> torch.Tensor:
        """See `Source`."""
        return read_video(find_file(path) or path)

    def audio(self, path: str) -> torch.Tensor:
        """See `Source`."""
        return read_audio(find_audio(path))

    def audio_start(self, path: str) -> int:
        """See `Source`; a WAV beside the video starts with it."""
        return 0 if find_file(wav_beside(path)) else audio_start(find_audio(path))


def _files_in(folder: str, *, limit: int) -> set[str]:
    """List the files among the first `limit` entries of a folder; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in islice(entries, limit) if entry.is_file()}
    except OSError:
        return set()
