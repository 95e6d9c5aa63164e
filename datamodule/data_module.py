"""Reads the label lists of a run and makes the loaders of its training, validation and test."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pytorch_lightning as pl

from datamodule.av_dataset import AVDataset, Vocabulary
from datamodule.label_list import LabelList
from datamodule.loaders import ClipLoader, ResumableLoader
from datamodule.media import MediaError, find_audio, wav_beside
from datamodule.noise import BabbleNoise, FileNoise, NoiseSource
from datamodule.samplers import LengthBucketBatchSampler, LongestFirstBatchSampler
from datamodule.transforms import AudioTransform, VideoTransform, needs_noise
from espnet.formats import CLEAN_SNR, STREAMS, VIDEO_RATE

log = logging.getLogger(__name__)

MOST_LISTED = 8  # entries of a folder for each file that is looked for in it


class DataModule(pl.LightningDataModule):
    """The data of a run.

    `setup` reads and checks the lists, once; call it before the model is built, so that errors in
    the lists come first. Processes share the utterances by rank and world size of the trainer,
    which must not replace the samplers (`use_distributed_sampler=False`).

    Args:
        root_dir: Folder that holds `labels/` and the datasets.
        streams: "video", "audio" or both: what the model takes.
        text_transform: The model's vocabulary.
        id_text_transform: Vocabulary of lists of token ids, if it is not the model's.
        takes_ids: Whether ids of a list may be the model's own; if not, and there is no
            `id_text_transform`, a list of ids is refused.
        train_file: Training list under `root_dir/labels/`.
        val_file: Validation list; None: no validation.
        test_file: Test list.
        max_frames: Most frames of a batch, counting the padding, and of an utterance.
        decode_max_frames: Most frames of a test batch; None: `max_frames`.
        train_num_buckets: Most groups of similar length.
        num_workers: Worker processes of a loader; 0 loads in the main process.
        seed: Seed of batches, masks, crops and noise; at least 0.
        crop_size: Height and width of the video in pixels.
        audio_normalize: Whether audio is layer-normalised over the utterance.
        max_seconds: Longest utterance that the audio encoder takes; None for no limit.
        noise_files: Noise; without one, babble of other utterances of the training list (of the
            test list where there is no training list).
        snr_targets: SNRs in dB of the tests to come; 999999 is clean.
        skip_bad_clips: Whether training leaves out, counts and logs clips that cannot be read or
            are longer than `max_frames` or `max_seconds`.

    Raises:
        ValueError: `streams` holds something else, or nothing.
    """

    def __init__(
        self,
        *,
        root_dir: str,
        streams: Sequence[str],
        text_transform: Vocabulary,
        id_text_transform: Vocabulary | None = None,
        takes_ids: bool = True,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        max_frames: int = 1600,
        decode_max_frames: int | None = None,
        train_num_buckets: int = 400,
        num_workers: int = 0,
        seed: int = 0,
        crop_size: int = 88,
        audio_normalize: bool = True,
        max_seconds: int | None = None,
        noise_files: Sequence[str] = (),
        snr_targets: Sequence[float] = (CLEAN_SNR,),
        skip_bad_clips: bool = False,
    ) -> None:
        super().__init__()
        if not streams or not set(streams) <= set(STREAMS):
            raise ValueError(f"got streams {tuple(streams)}, expected some of {STREAMS}")
        self.root_dir = root_dir
        self.streams = tuple(streams)
        self.text_transform = text_transform
        self.id_text_transform = id_text_transform
        self.takes_ids = takes_ids
        self.train_file = train_file
        self.val_file = val_file
        self.test_file = test_file
        self.max_frames = max_frames
        self.decode_max_frames = decode_max_frames or max_frames
        self.train_num_buckets = train_num_buckets
        self.num_workers = num_workers
        self.seed = seed
        self.crop_size = crop_size
        self.audio_normalize = audio_normalize
        self.longest_clip = max_frames  # frames
        self.too_long = "raise --max-frames or remove it"
        if max_seconds is not None and max_seconds * VIDEO_RATE < max_frames:
            self.longest_clip = max_seconds * VIDEO_RATE
            self.too_long = (
                f"the audio encoder takes {max_seconds} s: remove it or choose another "
                "--audio-encoder"
            )
        self.noise_files = tuple(noise_files)
        self.snr_targets = tuple(snr_targets)
        self.skip_bad_clips = skip_bad_clips
        self.train_dataset: AVDataset | None = None
        self.val_dataset: AVDataset | None = None
        self.test_datasets: dict[float, AVDataset] = {}  # by SNR
        self._labels: dict[str, LabelList] = {}
        self._noise: NoiseSource | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check what a stage needs, unless it has been read.

        Args:
            stage: "fit" (training and validation lists), "validate" or "test"; None: all three,
                those that were given.

        Raises:
            ValueError: A list is not given, cannot be read or is malformed, or an utterance is
                longer than `max_frames` or `max_seconds` (in training only without
                `skip_bad_clips`).
            MediaError: A clip is missing, or a noise file cannot be read.
        """
        if stage == "fit" or (stage is None and self.train_file):
            if self.train_dataset is None:
                self.train_dataset = self._dataset("train", self.train_file)
        if stage in ("fit", "validate", None) and self.val_file and self.val_dataset is None:
            self.val_dataset = self._dataset("val", self.val_file)
        if stage == "test" or (stage is None and self.test_file):
            for snr_target in self.snr_targets:
                if snr_target not in self.test_datasets:
                    dataset = self._dataset("test", self.test_file, snr_target)
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
        indices = np.arange(len(labels))
        if self.skip_bad_clips:
            indices = np.setdiff1d(indices, labels.longer_than(self.longest_clip))
        rank, world_size = self._rank_and_world_size()
        sampler = LengthBucketBatchSampler(
            labels.num_frames,
            max_frames=self.max_frames,
            num_buckets=self.train_num_buckets,
            seed=self.seed,
            indices=indices,
            redraw=not (self.trainer and self.trainer.overfit_batches),
            rank=rank,
            world_size=world_size,
        )
        return ResumableLoader(
            self.train_dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=True,
        )

    def val_dataloader(self) -> ClipLoader | list:
        """Make the loader of validation batches; an empty list without a validation list."""
        if self.val_dataset is None:
            return []
        return self._evaluation_loader(self.val_dataset, self.max_frames, persistent_workers=True)

    def test_dataloader(self, snr_target: float | None = None) -> ClipLoader:
        """Make the loader of test batches.

        Args:
            snr_target: One of `snr_targets`; None: the first.
        """
        dataset = self.test_datasets[self.snr_targets[0] if snr_target is None else snr_target]
        return self._evaluation_loader(dataset, self.decode_max_frames, persistent_workers=False)

    def _evaluation_loader(
        self, dataset: AVDataset, max_frames: int, *, persistent_workers: bool
    ) -> ClipLoader:
        rank, world_size = self._rank_and_world_size()
        sampler = LongestFirstBatchSampler(
            dataset.labels.num_frames,
            max_frames=max_frames,
            rank=rank,
            world_size=world_size,
        )
        return ClipLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=persistent_workers,
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _dataset(self, subset: str, file: str | None, snr_target: float | None = None) -> AVDataset:
        training = subset == "train"
        if not file:
            raise ValueError(f"got no {subset} list, expected a file name (--{subset}-file)")
        labels = self._read_labels(file)
        if labels.holds_ids and not self.takes_ids and self.id_text_transform is None:
            raise ValueError(
                f"{file} holds token ids, which are not those of the pretrained decoder: give "
                "their SentencePiece model (--sp-model-path), or a list with plain text"
            )
        self._check_lengths(labels, may_skip=training and self.skip_bad_clips)
        with_video, with_audio = ("video" in self.streams), ("audio" in self.streams)
        dataset = AVDataset(
            labels=labels,
            text_transform=self.text_transform,
            id_text_transform=self.id_text_transform,
            video_transform=(
                VideoTransform(subset=subset, crop_size=self.crop_size) if with_video else None
            ),
            audio_transform=self._audio_transform(subset, snr_target) if with_audio else None,
            training=training,
            seed=self.seed,
            max_frames=self.longest_clip,
            too_long=self.too_long,
            skip_bad_clips=training and self.skip_bad_clips,
        )
        if not dataset.skip_bad_clips:
            self._check_files(labels)
        return dataset

    def _audio_transform(self, subset: str, snr_target: float | None) -> AudioTransform:
        noisy = subset == "train" or needs_noise(snr_target)
        return AudioTransform(
            subset=subset,
            noise=self._noise_source() if noisy else None,
            snr_target=snr_target,
            normalize=self.audio_normalize,
        )

    def _noise_source(self) -> NoiseSource:
        if self._noise is None and self.noise_files:
            self._noise = FileNoise(self.noise_files)
        elif self._noise is None:
            self._noise = BabbleNoise(
                self._read_labels(self.train_file or self.test_file),
                seed=self.seed,
                skip_bad_clips=self.skip_bad_clips,
            )
        return self._noise

    def _read_labels(self, file: str) -> LabelList:
        if file not in self._labels:
            self._labels[file] = LabelList(self.root_dir, file)
        return self._labels[file]

    def _check_files(self, labels: LabelList) -> None:
        """Refuse a list whose files are missing; what is in them is seen when they are read.

        Folders are listed, which takes much less time than to ask for their files one by one; that
        is left for the files that were not seen.
        """
        with_video = "video" in self.streams
        unseen: list[int] = []
        for folder, indices, names in labels.folders():
            seen = _files_in(folder, limit=MOST_LISTED * len(names))
            for index, name in zip(indices.tolist(), names, strict=True):
                if name not in seen and (with_video or wav_beside(name) not in seen):
                    unseen.append(index)
        for index in sorted(unseen):
            path = labels.path(index) if with_video else find_audio(labels.path(index))
            if not os.path.isfile(path):
                raise MediaError(path, f"it does not exist, but {labels.where(index)} names it")

    def _check_lengths(self, labels: LabelList, *, may_skip: bool) -> None:
        too_long = labels.longer_than(self.longest_clip)
        if len(too_long) == 0:
            return
        first = int(too_long[0])
        message = (
            f"{labels.where(first)}: got a clip of {labels.num_frames[first]} frames, expected at "
            f"most {self.longest_clip}; {self.too_long}"
        )
        if not may_skip or len(too_long) == len(labels):
            raise ValueError(message)
        log.warning("left out %d clips that are too long; the first is %s", len(too_long), message)


def _files_in(folder: str, *, limit: int) -> set[str]:
    """List the files among the first `limit` entries of a folder; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in islice(entries, limit) if entry.is_file()}
    except OSError:
        return set()
