"""Reads one utterance of a label list: its video, its audio and the token ids of its text."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from datamodule.bad_clip import BadClip
from datamodule.label_format import holds_ids
from datamodule.label_list import LabelList
from datamodule.media import MediaError
from datamodule.sources import FileSource, Source
from datamodule.text_transform import UNKNOWN
from datamodule.transforms import AudioTransform, VideoTransform
from espnet.errors import first_line
from espnet.formats import AUDIO_RATE, SAMPLES_PER_FRAME, VIDEO_RATE

log = logging.getLogger(__name__)

BYTES_IN_LOWER_CASE = 1.5  # at most, for each byte of a text
MAX_DRIFT = AUDIO_RATE // 5  # samples by which audio and video may differ in length: 0.2 s

SILENT_RANGE = 2e-4  # between peaks: six steps of 16 bits are dither, but no speech


class Vocabulary(Protocol):
    """What translates between text and token ids."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def takes_text(self) -> bool:
        """Whether it can write text; if not, it only knows ids."""

    @property
    def token_list(self) -> list[str]:
        """All tokens; the index is the id."""

    @property
    def odim(self) -> int:
        """Size of the vocabulary; ids of text lie within 1 and odim - 2."""

    def normalize(self, text: str) -> str:
        """Write text as the model writes it: in its case, with its forms of characters."""

    def tokenize(self, text: str) -> torch.Tensor:
        """Turn text into ids, int64 (U,)."""

    def unknown(self, text: str) -> list[str]:
        """List the parts of a text that it cannot write."""

    def post_process(self, ids: torch.Tensor | Iterable[int]) -> str:
        """Turn ids into text."""


@dataclass(kw_only=True, eq=False)
class AVDataset(Dataset):
    """The utterances of a label list.

    What an item holds is a function of (seed, epoch, index) in training and of (seed, file name)
    otherwise, whatever process reads it and in whatever order.

    Raises:
        ValueError: Both streams are left out.
        ValueError: A token id of the list is outside its vocabulary, or not one.
        ValueError: The list holds numbers that may be token ids or transcripts.
    """

    labels: LabelList
    text_transform: Vocabulary  # the model's
    # Of a list that holds token ids which are not the model's: they become text, the text new ids.
    id_text_transform: Vocabulary | None = None
    label_format: str = "auto"  # what the last fields hold: `ids`, `text`, or what they look like
    video_transform: VideoTransform | None = None  # None leaves the video out
    audio_transform: AudioTransform | None = None  # None leaves the audio out
    training: bool = False  # whether the random transforms differ from epoch to epoch
    seed: int = 0  # of masks, crops and noise
    max_frames: int | None = None  # that a clip may really have, whatever its list says
    too_long: str = "raise --max-frames or remove it"  # what to do with a longer one
    skip_bad_clips: bool = False  # whether an utterance that cannot be used gives a `BadClip`
    needs_target: bool = True  # whether items have the token ids of their text
    source: Source = field(default_factory=FileSource)
    holds_ids: bool = field(init=False)  # whether the list holds token ids; plain text if not

    def __post_init__(self) -> None:
        if self.video_transform is None and self.audio_transform is None:
            raise ValueError("got no video_transform and no audio_transform, expected one or both")
        self.holds_ids = holds_ids(self.labels, self.label_format, self._id_vocabulary)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any] | BadClip:
        """Read one utterance.

        Args:
            key: Index of the utterance, or (index, epoch).

        Returns:
            `video` float32 (T, 1, H, W) and `audio` float32 (S, 1), without the streams that are
            left out, S = 640 T if there are both; `target` int64 (U,); `index`. What stands in the
            way of one that is skipped, which is logged.

        Raises:
            MediaError: The clip cannot be read, is silent, is not as long as its list says, or does
                not fit the transforms; its audio and video are neither of one length nor end at
                one time, to 0.2 s; or its text, which is not empty, gives no token.
        """
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        item: dict[str, Any] = {"index": index}
        try:
            if self.needs_target:
                item["target"] = self.target(index)
            item.update(self._read_streams(index, self._generator(index, epoch)))
        except (ValueError, OSError) as error:
            named = error if isinstance(error, MediaError) else None
            named = named or MediaError(self.path(index), first_line(error))
            if not self.skip_bad_clips:
                raise named from None
            log.warning("skipped a bad clip: %s", named)
            return BadClip(index, *named.args)
        return item

    def unfit_texts(self, most_tokens: Callable[[int], int] | None) -> Iterator[BadClip]:
        """Find the utterances whose text gives no token, or too many.

        Texts that can be neither are not tokenised, which takes long: those with a letter or digit,
        and no more bytes than there may be tokens.

        Args:
            most_tokens: Most tokens of a text, by the frames of its utterance; None for no limit.
        """
        if self.holds_ids and self.id_text_transform is None:
            return
        for index in range(len(self)):
            text = self.text(index)
            most = most_tokens(int(self.labels.num_frames[index])) if most_tokens else math.inf
            longest = BYTES_IN_LOWER_CASE * len(text.encode()) + 1  # and a space before it
            if longest <= most and any(map(str.isalnum, text)):
                continue
            try:
                tokens = len(self.target(index))
            except MediaError as error:
                yield BadClip(index, *error.args)
                continue
            if tokens > most > 0:  # Where no text has room, it is not for texts to be shorter.
                cause = (
                    f"the text has {tokens} tokens, expected at most {most}, which the decoder "
                    "takes; shorten it or remove the row"
                )
                yield BadClip(index, self.labels.where(index), cause)

    def text(self, index: int) -> str:
        """Return the reference text; token ids are turned back into text."""
        if self.holds_ids:
            return self._id_vocabulary.post_process(self.labels.token_ids(index))
        return self.labels.text(index)

    def reference(self, index: int) -> str:
        """Return the reference text as the model would write it."""
        return self.text_transform.normalize(self.text(index))

    def unknown(self, index: int) -> tuple[list[str], int]:
        """Return the parts of a text that the model cannot write, and how many tokens it can."""
        if self.holds_ids and self.id_text_transform is None:
            tokens = [self.text_transform.token_list[i] for i in self.labels.token_ids(index)]
            lost = [token for token in tokens if token == UNKNOWN]
        else:
            text = self.text(index)
            lost, tokens = self.text_transform.unknown(text), self.text_transform.tokenize(text)
        return lost, max(0, len(tokens) - len(lost))

    def target(self, index: int) -> torch.Tensor:
        """Return the token ids of the reference in the model's vocabulary, int64 (U,).

        An empty reference, silence, has none; nor has a list for decoding only.

        Raises:
            MediaError: A text that is not empty gives no token; it names the list and the line.
        """
        if self.holds_ids and self.id_text_transform is None:
            return torch.tensor(self.labels.token_ids(index), dtype=torch.int64)
        target = self.text_transform.tokenize(self.text(index))
        if len(target) == 0 and self.text(index):
            raise MediaError(
                self.labels.where(index),
                f"the text {self.labels.text(index)!r} gives no token, expected words of the "
                "model's vocabulary",
            )
        return target

    def utterance_id(self, index: int) -> str:
        """Return `dataset/relative/path` without the suffix."""
        return self.labels.utterance_id(index)

    def path(self, index: int) -> str:
        """Return the path of the video file."""
        return self.labels.path(index)

    @property
    def _id_vocabulary(self) -> Vocabulary:
        return self.id_text_transform or self.text_transform

    def _generator(self, index: int, epoch: int) -> torch.Generator:
        if self.training:
            key = (self.seed, epoch, index)
        else:
            key = (self.seed, zlib.crc32(self.utterance_id(index).encode()))
        state = np.random.SeedSequence(key).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def _check_length(
        self, path: str, video: torch.Tensor | None, audio: torch.Tensor | None
    ) -> None:
        """Refuse clips that are longer than a batch or shorter than a frame."""
        frames = len(video) if video is not None else len(audio) // SAMPLES_PER_FRAME
        if frames == 0:
            raise MediaError(path, "its sound is shorter than a frame, expected at least 0.04 s")
        if self.max_frames is not None and frames > self.max_frames:
            raise MediaError(
                path,
                f"it has {frames} frames, expected at most {self.max_frames}; {self.too_long}",
            )

    def _check_number(
        self, index: int, path: str, video: torch.Tensor | None, audio: torch.Tensor | None
    ) -> None:
        """Refuse a clip whose length is not what its list says: it is cut, or another one.

        0.2 s are allowed, which is more than other frame rates round to, but no more than a quarter
        of a short clip. Sound alone may also be as long without what delays it.
        """
        expected = int(self.labels.num_frames[index])
        allowed = min(MAX_DRIFT // SAMPLES_PER_FRAME, max(1, expected // 4))
        frames = len(video) if video is not None else round(len(audio) / SAMPLES_PER_FRAME)
        if abs(frames - expected) <= allowed:
            return
        if video is None:
            start = round(self.source.audio_start(path) / SAMPLES_PER_FRAME)
            if abs(frames - start - expected) <= allowed:
                return
        raise MediaError(
            path,
            f"it has {frames} frames at {VIDEO_RATE} a second, expected about {expected}, "
            f"the number in {self.labels.where(index)}; correct the number, or the clip if it is "
            "cut off",
        )

    def _read_streams(self, index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        path = self.path(index)
        video = self.source.video(path) if self.video_transform else None  # (T, H, W)
        audio = self.source.audio(path) if self.audio_transform else None  # (S,)
        self._check_length(path, video, audio)
        self._check_number(index, path, video, audio)
        if video is not None and audio is not None:
            audio = self._fit_to_video(audio, len(video), path)
        streams = {}
        if audio is not None:
            if float(audio.max() - audio.min()) < SILENT_RANGE:
                raise MediaError(path, "its sound is silent, expected speech")
            streams["audio"] = self.audio_transform(audio, generator, exclude=path)
        if video is not None:
            streams["video"] = self.video_transform(video, generator)
        return streams

    def _fit_to_video(self, audio: torch.Tensor, num_frames: int, path: str) -> torch.Tensor:
        """Cut audio (S,) or pad it with zeros to the length of the video: (640 T,).

        Streams of one length that start at different times, as a cut without encoding leaves them,
        belong together though they do not end together.
        """
        missing = num_frames * SAMPLES_PER_FRAME - len(audio)
        if abs(missing) > MAX_DRIFT:
            start = self.source.audio_start(path)
            if abs(missing + start) > MAX_DRIFT:
                raise MediaError(
                    path,
                    f"the video lasts {num_frames / VIDEO_RATE:.2f} s and the audio "
                    f"{(len(audio) - start) / AUDIO_RATE:.2f} s, expected a difference of at most "
                    "0.2 s",
                )
        return F.pad(audio, (0, missing))  # A negative number cuts.
