"""Reads the label lists of a run and makes the loaders of its training, validation and test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytorch_lightning as pl

from datamodule.av_dataset import AVDataset, Vocabulary
from datamodule.bad_clip import by_cause
from datamodule.label_list import LabelList
from datamodule.loaders import ClipLoader, ResumableLoader
from datamodule.media import MediaError
from datamodule.noise import BabbleNoise, FileNoise, NoiseSource
from datamodule.options import DataOptions
from datamodule.samplers import LengthBucketBatchSampler, LongestFirstBatchSampler
from datamodule.sources import build_source
from datamodule.transforms import AudioTransform, VideoTransform, needs_noise
from datamodule.unknown_text import unknown_report
from espnet.formats import CLEAN_SNR, STREAMS, VIDEO_RATE

log = logging.getLogger(__name__)


class DataModule(pl.LightningDataModule):
    """The data of a run.

    `setup` reads and checks the lists, once; call it before the model is built, so that errors in
    the lists come first. Processes share the utterances by rank and world size of the trainer,
    which must not replace the samplers (`use_distributed_sampler=False`).

    Args:
        options: Which lists, and how to batch them.
        streams: "video", "audio" or both: what the model takes.
        text_transform: The model's vocabulary.
        id_text_transform: Vocabulary of lists of token ids, if it is not the model's.
        takes_ids: Whether ids of a list may be the model's own; if not, and there is no
            `id_text_transform`, a list of ids is refused.
        audio_normalize: Whether audio is layer-normalised over the utterance.
        max_seconds: Longest utterance that the audio encoder takes; None for no limit.
        most_tokens: Most tokens of a text that the decoder takes, by the frames of its utterance;
            None for no limit.
        snr_targets: SNRs in dB of the tests to come; 999999 is clean.

    Raises:
        ValueError: `streams` holds something else, or nothing.
    """

    def __init__(
        self,
        options: DataOptions,
        *,
        streams: Sequence[str],
        text_transform: Vocabulary,
        id_text_transform: Vocabulary | None = None,
        takes_ids: bool = True,
        audio_normalize: bool = True,
        max_seconds: int | None = None,
        most_tokens: Callable[[int], int] | None = None,
        snr_targets: Sequence[float] = (CLEAN_SNR,),
    ) -> None:
        super().__init__()
        if not streams or not set(streams) <= set(STREAMS):
            raise ValueError(f"got streams {tuple(streams)}, expected some of {STREAMS}")
        self.options = options
        self.streams = tuple(streams)
        self.text_transform = text_transform
        self.id_text_transform = id_text_transform
        self.takes_ids = takes_ids
        self.audio_normalize = audio_normalize
        self.longest_clip = options.max_frames
        self.too_long = "raise --max-frames or remove it"
        if max_seconds is not None and max_seconds * VIDEO_RATE < options.max_frames:
            self.longest_clip = max_seconds * VIDEO_RATE
            self.too_long = (
                f"the audio encoder takes {max_seconds} s: remove it or choose another "
                "--audio-encoder"
            )
        self.most_tokens = most_tokens
        self.snr_targets = tuple(snr_targets)
        self.train_dataset: AVDataset | None = None
        self.val_dataset: AVDataset | None = None
        self.test_datasets: dict[float, AVDataset] = {}  # by SNR
        self.contents: dict[str, str] = {}  # what each list holds
        self._labels: dict[str, LabelList] = {}
        self._usable: dict[str, np.ndarray] = {}  # indices of utterances, by subset
        self._noise: NoiseSource | None = None
        self._source = build_source(options)

    def setup(self, stage: str | None = None) -> None:
        """Read and check what a stage needs, unless it has been read.

        Args:
            stage: "fit" (training and validation lists), "validate" or "test"; None: all three,
                those that were given.

        Raises:
            ValueError: A list is not given, cannot be read or is malformed, or an utterance is
                longer than `max_frames` or `max_seconds` (in training and validation only without
                `skip_bad_clips`).
            ValueError: A test calls for noise and there is none but the clip itself.
            MediaError: A clip is missing, or a text to train or validate on gives no token or too
                many (only without `skip_bad_clips`), or a noise file cannot be read or is silent.
        """
        if stage == "fit" or (stage is None and self.options.train_file):
            if self.train_dataset is None:
                self.train_dataset = self._dataset("train", self.options.train_file)
        if stage != "test" and self.options.val_file and self.val_dataset is None:
            self.val_dataset = self._dataset("val", self.options.val_file)
        if stage == "test" or (stage is None and self.options.test_file):
            for snr_target in self.snr_targets:
                if snr_target not in self.test_datasets:
                    dataset = self._dataset("test", self.options.test_file, snr_target)
                    self.test_datasets[snr_target] = dataset

    @property
    def longest_utterance(self) -> int:
        """Frames of the longest utterance of the lists that have been read."""
        datasets = [self.train_dataset, self.val_dataset, *self.test_datasets.values()]
        longest = [int(dataset.labels.num_frames.max()) for dataset in datasets if dataset]
        return min(max(longest, default=0), self.longest_clip)

    def train_dataloader(self) -> ResumableLoader:
        """Make the loader of training batches, which are re-drawn every epoch."""
        labels = self.train_dataset.labels
        sampler = LengthBucketBatchSampler(
            labels.num_frames,
            max_frames=self.options.max_frames,
            num_buckets=self.options.train_num_buckets,
            seed=self.options.seed,
            indices=self._usable["train"],
            redraw=not (self.trainer and self.trainer.overfit_batches),
            **self._share(),
        )
        return ResumableLoader(
            self.train_dataset,
            batch_sampler=sampler,
            num_workers=self.options.num_workers,
            persistent_workers=True,
        )

    def val_dataloader(self) -> ClipLoader | list:
        """Make the loader of validation batches; an empty list without a validation list."""
        if self.val_dataset is None:
            return []
        return self._evaluation_loader(
            self.val_dataset,
            self._usable["val"],
            self.options.max_frames,
            persistent_workers=True,
        )

    def test_dataloader(
        self,
        snr_target: float | None = None,
        *,
        indices: np.ndarray | None = None,
        to_decode: bool = False,
    ) -> ClipLoader:
        """Make the loader of test batches.

        Args:
            snr_target: One of `snr_targets`; None: the first.
            indices: The utterances that take part; None: all.
            to_decode: Whether batches have no targets, and name clips that cannot be read instead
                of raising their error.
        """
        dataset = self.test_datasets[self.snr_targets[0] if snr_target is None else snr_target]
        if to_decode:
            dataset = replace(dataset, skip_bad_clips=True, needs_target=False)
        return self._evaluation_loader(
            dataset, indices, self.options.decode_max_frames, persistent_workers=False
        )

    def _evaluation_loader(
        self,
        dataset: AVDataset,
        indices: np.ndarray | None,
        max_frames: int,
        *,
        persistent_workers: bool,
    ) -> ClipLoader:
        sampler = LongestFirstBatchSampler(
            dataset.labels.num_frames, max_frames=max_frames, indices=indices, **self._share()
        )
        return ClipLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.options.num_workers,
            persistent_workers=persistent_workers,
        )

    def _share(self) -> dict[str, int]:
        if self.trainer is None:
            return {}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _dataset(self, subset: str, file: str | None, snr_target: float | None = None) -> AVDataset:
        training = subset == "train"
        if not file:
            raise ValueError(f"got no {subset} list, expected a file name (--{subset}-file)")
        labels = self._read_labels(file)
        if subset != "test" and not labels.has_labels:
            raise ValueError(
                f"{file} has no transcripts, which {subset} lists need: add them as the last field "
                "(only a test list may leave it out, to be decoded)"
            )
        label_format = self.options.label_format
        if not self.takes_ids and self.id_text_transform is None and label_format != "text":
            self._refuse_ids(file, labels)
            label_format = "text"
        may_skip = subset != "test" and self.options.skip_bad_clips
        too_long = self._check_lengths(labels, may_skip=may_skip)
        with_video, with_audio = ("video" in self.streams), ("audio" in self.streams)
        video_transform = VideoTransform(subset=subset, crop_size=self.options.crop_size)
        dataset = AVDataset(
            labels=labels,
            source=self._source,
            text_transform=self.text_transform,
            id_text_transform=self.id_text_transform,
            label_format=label_format,
            video_transform=video_transform if with_video else None,
            audio_transform=(
                self._audio_transform(subset, snr_target, labels) if with_audio else None
            ),
            training=training,
            seed=self.options.seed,
            max_frames=self.longest_clip,
            too_long=self.too_long,
            skip_bad_clips=may_skip,
        )
        self._tell_contents(file, dataset)
        if not self.options.skip_bad_clips:
            self._source.check(labels, with_video=with_video)
        if subset != "test":
            left_out = np.union1d(too_long, self._check_texts(dataset))
            self._usable[subset] = np.setdiff1d(np.arange(len(labels)), left_out)
            if not len(self._usable[subset]):
                raise ValueError(f"{labels.file}: no utterance is left, expected one that fits")
        return dataset

    def _check_texts(self, dataset: AVDataset) -> list[int]:
        """Refuse texts that no loss can be computed of, or return the rows to leave out."""
        unfit = list(dataset.unfit_texts(self.most_tokens))
        if unfit and not dataset.skip_bad_clips:
            raise MediaError(unfit[0].where, unfit[0].cause)
        if unfit:
            log.warning("left out %s", by_cause(unfit))
        return [clip.index for clip in unfit]

    def _refuse_ids(self, file: str, labels: LabelList) -> None:
        """Refuse token ids where nothing knows their vocabulary."""
        if self.options.label_format == "ids" or _all_numbers(labels):
            raise ValueError(
                f"{file} holds token ids, which are not those of the pretrained decoder: give "
                "their SentencePiece model (--sp-model-path), or a list with plain text (if it has "
                "transcripts in digits, --label-format text)"
            )

    def _tell_contents(self, file: str, dataset: AVDataset) -> None:
        """Say what a list holds, when it is first used, and what of it is unknown.

        Raises:
            ValueError: Too much of it is.
        """
        if file in self.contents:
            return
        vocabulary = self.id_text_transform or self.text_transform
        kind = f"token ids of {vocabulary.name}" if dataset.holds_ids else "text"
        self.contents[file] = kind if dataset.labels.has_labels else "no transcripts"
        empty = int(dataset.labels.is_empty.sum()) if dataset.labels.has_labels else 0
        silence = f", {empty} of them empty (silence)" if empty else ""
        log.info("%s: %s%s", file, self.contents[file], silence)
        if report := unknown_report(dataset):
            log.warning(report)

    def _audio_transform(
        self, subset: str, snr_target: float | None, labels: LabelList
    ) -> AudioTransform:
        noisy = subset == "train" or needs_noise(snr_target)
        noise = self._noise_source(subset) if noisy else None
        only = noise.only_clip if isinstance(noise, BabbleNoise) else None
        if only is not None and only in map(labels.path, range(len(labels))):
            message = (
                f"{only} is the only clip to make babble of, expected others to disturb it with: "
                "give noise recordings (--noise-file) or a longer list"
            )
            if subset != "train":
                raise ValueError(message)
            log.warning("training without noise: %s", message)
            noise = None
        return AudioTransform(
            subset=subset, noise=noise, snr_target=snr_target, normalize=self.audio_normalize
        )

    def _noise_source(self, subset: str) -> NoiseSource:
        if self._noise is None and self.options.noise_file:
            self._noise = FileNoise(self.options.noise_file)
        elif self._noise is None:
            self._noise = BabbleNoise(
                self._read_labels(self.options.train_file or self.options.test_file),
                self._source,
                seed=self.options.seed,
                # In a scoring alone, a bad clip must not spoil those that it would be mixed with.
                skip_bad_clips=self.options.skip_bad_clips or subset == "test",
            )
        return self._noise

    def _read_labels(self, file: str) -> LabelList:
        if file not in self._labels:
            self._labels[file] = LabelList(self.options.root_dir, file)
        return self._labels[file]

    def _check_lengths(self, labels: LabelList, *, may_skip: bool) -> np.ndarray:
        """Refuse utterances that are too long, or return the rows to leave out."""
        too_long = labels.longer_than(self.longest_clip)
        if len(too_long) == 0:
            return too_long
        first = int(too_long[0])
        message = (
            f"{labels.where(first)}: got a clip of {labels.num_frames[first]} frames, expected at "
            f"most {self.longest_clip}; {self.too_long}"
        )
        if not may_skip or len(too_long) == len(labels):
            raise ValueError(message)
        log.warning("left out %d clips that are too long; the first is %s", len(too_long), message)
        return too_long


def _all_numbers(labels: LabelList) -> bool:
    """Whether last fields are token ids, or look like it."""
    return not labels.is_text.any() and not labels.is_empty.all()
