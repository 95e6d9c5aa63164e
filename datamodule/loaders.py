"""Pads utterances to batches and loads them, in worker processes or in this one."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from datamodule.bad_clip import BadClip
from espnet.formats import IGNORE_ID, STREAMS

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what ends a run; the second is SLURM's

Item = dict[str, Any]


def collate_pad(items: list[Item | BadClip]) -> dict[str, Any]:
    """Pad utterances to a batch.

    Args:
        items: What `AVDataset` gives.

    Returns:
        `videos` float32 (B, T, 1, H, W) and `audios` float32 (B, S, 1), padded with zeros, with
        `video_lengths` in frames and `audio_lengths` in samples (B,), those streams that the items
        have; `targets` int64 (B, U) padded with -1 and `target_lengths` (B,), if they have any;
        `indices` (B,), the utterances' places in their list; `num_bad_clips`, an int, how many are
        missing, and, if there are any, the list of them, `bad_clips`. If all are bad there is an
        empty `indices` (0,) and no stream.
    """
    clips = [item for item in items if isinstance(item, dict)]
    batch: dict[str, Any] = {
        "indices": torch.tensor([clip["index"] for clip in clips], dtype=torch.int64),
        "num_bad_clips": len(items) - len(clips),
    }
    if bad := [item for item in items if isinstance(item, BadClip)]:
        batch["bad_clips"] = bad
    if not clips:
        return batch
    for name in (name for name in (*STREAMS, "target") if name in clips[0]):
        sequences = [clip[name] for clip in clips]
        padding = IGNORE_ID if name == "target" else 0
        batch[f"{name}s"] = _pad(sequences, padding)
        batch[f"{name}_lengths"] = torch.tensor([len(sequence) for sequence in sequences])
    return batch


def model_inputs(batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The streams of a batch and their lengths, by stream, in the form that `E2E` takes."""
    streams = [stream for stream in STREAMS if f"{stream}s" in batch]
    features = {stream: batch[f"{stream}s"] for stream in streams}
    return features, {stream: batch[f"{stream}_lengths"] for stream in streams}


def _pad(sequences: list[torch.Tensor], padding: int) -> torch.Tensor:
    """Pad sequences (T, ...) to one tensor (B, longest T, ...)."""
    first = sequences[0]
    shape = (len(sequences), max(map(len, sequences)), *first.shape[1:])
    if get_worker_info() is None:
        # NumPy asks for huge pages, without which most of the time would go into page faults.
        batch = torch.from_numpy(np.empty(shape, first.numpy().dtype))
    else:
        # As in torch's own collate: in the memory that the batch would else be copied to, to be
        # passed on to the parent.
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * first.element_size())
        batch = torch.empty(0, dtype=first.dtype).set_(storage, 0, shape)
    for row, sequence in zip(batch, sequences, strict=True):
        row[: len(sequence)] = sequence
        row[len(sequence) :] = padding
    return batch


class ClipLoader(DataLoader):
    """Loads batches, and raises errors in the data here, in one line, not as a worker's traceback.

    An iterator starts its workers with the first batch that is asked for, so an epoch announced
    before that counts. With 0 workers, batches are loaded in this process.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_sampler: Sampler,
        num_workers: int = 0,
        persistent_workers: bool = False,
    ) -> None:
        # Forked workers share the lists that this process has read, and heed its signals as they
        # should; from Python 3.14 on, Linux too would start them otherwise.
        forked = num_workers > 0 and sys.platform == "linux"
        super().__init__(
            _ErrorsAsItems(dataset),
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            persistent_workers=persistent_workers and num_workers > 0,
            multiprocessing_context="fork" if forked else None,
            collate_fn=_collate_or_error,
            worker_init_fn=_prepare_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if isinstance(batch, ValueError):
                raise batch
            yield batch

    def load(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        """Load a batch of one's own choice in this process, by keys as a sampler gives them."""
        batch = self.collate_fn([self.dataset[key] for key in keys])
        if isinstance(batch, ValueError):
            raise batch
        return batch


class ResumableLoader(ClipLoader):
    """Loads training batches; its state lets a run go on in the middle of an epoch.

    The batch sampler has `set_epoch(epoch, start_batch)` and `epoch`.
    """

    _given = 0  # batches of the current epoch that have been handed out
    _resume = (-1, 0)  # an epoch that was cut short, and its number of batches until then

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.batch_sampler.epoch
        self._given = self._resume[1] if self._resume[0] == epoch else 0
        self._resume = (-1, 0)
        self.batch_sampler.set_epoch(epoch, start_batch=self._given)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches have been handed out."""
        return {"epoch": self.batch_sampler.epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was taken, once that epoch is announced."""
        self._resume = (state["epoch"], state["batches"])


class _ErrorsAsItems(Dataset):
    """A dataset that returns the ValueError of an item instead of raising it."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: tuple[int, int]) -> Item | BadClip | ValueError:
        try:
            return self._dataset[key]
        except ValueError as error:
            return error


def _collate_or_error(items: list[Item | BadClip | ValueError]) -> dict[str, Any] | ValueError:
    for item in items:
        if isinstance(item, ValueError):
            return item
    return collate_pad(items)


def _prepare_worker(_: int) -> None:
    """Leave the cores to the other workers, and leave it to the parent when to end.

    A signal may reach all processes of a run. The parent then saves, which takes until its step is
    over, and a worker that had ended by then would take it down. Systems that do not tell who sent
    a signal, as macOS, leave workers to obey any.
    """
    torch.set_num_threads(1)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING_SIGNALS)
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Obey those signals that come from the parent."""
    while signal.sigwaitinfo(STOPPING_SIGNALS).si_pid != parent:
        pass
    os._exit(0)
