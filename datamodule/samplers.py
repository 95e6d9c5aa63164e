"""Cuts a list of utterances into batches of similar length, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

BATCHES_PER_BUCKET = 4  # at least; fewer would put the same utterances together every epoch

Batch = list[tuple[int, int]]  # (index, epoch) of each utterance


class LengthBucketBatchSampler(Sampler[Batch]):
    """Training batches of utterances of similar length, re-drawn every epoch.

    Utterances are sorted by length into buckets that hold the same number of frames, and shuffled
    within their bucket. Batches are cut where they would exceed `max_frames` if all their
    utterances were as long as the longest of the bucket. So the cuts do not depend on the draw, and
    every epoch has the same number of batches. At each step all processes get batches of similar
    length.

    Args:
        lengths: Number of frames of each utterance (N,).
        max_frames: Most frames of a batch, counting the padding.
        num_buckets: Most buckets; there are fewer if they would hold fewer than 4 batches.
        seed: Seed of the draw.
        indices: The utterances that take part; None: all.
        redraw: Whether each epoch draws anew; otherwise all are like epoch 0.
        rank: Number of this process.
        world_size: Number of processes. All get the same number of batches and each utterance goes
            to one of them. A batch is empty where there are too few utterances to share.

    Raises:
        ValueError: There are fewer utterances than processes.
        ValueError: An utterance is longer than `max_frames`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        max_frames: int,
        num_buckets: int,
        seed: int,
        indices: np.ndarray | None = None,
        redraw: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        indices = np.arange(len(lengths)) if indices is None else indices
        lengths = np.asarray(lengths)[indices]
        if len(lengths) < world_size:
            raise ValueError(
                f"got {len(lengths)} training utterances for {world_size} processes, expected at "
                "least one for each; train on fewer devices or on more data"
            )
        if lengths.max() > max_frames:
            raise ValueError(
                f"got an utterance of {lengths.max()} frames, expected at most {max_frames}; raise "
                "--max-frames or remove it"
            )
        order = np.argsort(lengths, kind="stable")
        self._indices, lengths = indices[order], lengths[order]
        self._buckets = _assign_buckets(lengths, max_frames, num_buckets)
        last_of_bucket = np.searchsorted(self._buckets, self._buckets, side="right") - 1
        self._longest = lengths[last_of_bucket]  # of the bucket of each utterance
        cuts = _cut_ascending(self._longest, max_frames)
        self._cuts = _split_evenly(cuts, world_size)  # (batches, 2), positions in the sorted order
        self._seed = seed
        self._redraw = redraw
        self._rank = rank
        self._world_size = world_size
        self.epoch = 0
        self.start_batch = 0

    @property
    def sampler(self) -> LengthBucketBatchSampler:
        """Itself: Lightning announces each epoch to the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the next epoch, counted from 0, and how many of its batches to leave out."""
        self.epoch = epoch
        self.start_batch = start_batch

    def largest_batches(self) -> list[Batch]:
        """Return the batches that need the most memory, as the least lucky draw would fill them.

        They are this process's batch of the step in which one has the most frames, padding
        included, and, if that is another step, of the one in which frames times the longest
        utterance are most: attention takes memory for these.
        """
        begins, ends = self._cuts.T
        longest = self._longest[np.maximum(ends - 1, 0)]
        frames = (ends - begins) * longest  # (batches,)
        per_step = np.stack([frames, frames * longest]).reshape(2, -1, self._world_size).max(2)
        steps = dict.fromkeys(per_step.argmax(1).tolist())
        return [self._longest_of(*self._cuts[s * self._world_size + self._rank]) for s in steps]

    def _longest_of(self, begin: int, end: int) -> Batch:
        """Fill the batch [begin, end) with the longest utterances of its buckets."""
        batch = []
        for bucket, count in zip(
            *np.unique(self._buckets[begin:end], return_counts=True), strict=True
        ):
            after = np.searchsorted(self._buckets, bucket, side="right")
            batch += self._indices[after - count : after].tolist()
        return [(index, 0) for index in batch]

    def __len__(self) -> int:
        """Count the batches of a whole epoch on this process."""
        return len(self._cuts) // self._world_size

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch if self._redraw else 0
        rng = np.random.default_rng((self._seed, epoch))
        shuffled = self._indices[np.lexsort((rng.random(len(self._indices)), self._buckets))]
        for step in rng.permutation(len(self))[self.start_batch :]:
            begin, end = self._cuts[step * self._world_size + self._rank]
            yield [(index, epoch) for index in shuffled[begin:end].tolist()]


class LongestFirstBatchSampler(Sampler[Batch]):
    """Evaluation batches: every utterance once over all processes, the longest first.

    Args:
        lengths: Number of frames of each utterance (N,).
        max_frames: Most frames of a batch, counting the padding; a longer utterance is alone.
        indices: The utterances that take part; None: all. If they are fewer than the processes,
            but not none, some of them are in several processes.
        rank: Number of this process.
        world_size: Number of processes; some may get one batch fewer, but none gets none.

    Raises:
        ValueError: There are fewer utterances than processes.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        max_frames: int,
        indices: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(lengths) < world_size:
            raise ValueError(
                f"got {len(lengths)} utterances to evaluate for {world_size} processes, expected "
                "at least one for each; use fewer devices"
            )
        order = np.argsort(-lengths.astype(np.int64), kind="stable")
        if indices is not None:
            order = order[np.isin(order, indices)]
            if 0 < len(order) < world_size:
                order = np.repeat(order, -(-world_size // len(order)))
        order = order.tolist()
        batches, begin = [], 0
        while begin < len(order):
            end = begin + max(1, max_frames // int(lengths[order[begin]]))
            batches.append([(index, 0) for index in order[begin:end]])
            begin = end
        while order and len(batches) < world_size:
            largest = max(batches, key=len)
            batches.append([largest.pop() for _ in range(len(largest) // 2)])
        self._batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _assign_buckets(lengths: np.ndarray, max_frames: int, num_buckets: int) -> np.ndarray:
    """Number the buckets of about equally many frames: ascending lengths (N,) -> (N,)."""
    frames_before = np.cumsum(lengths, dtype=np.int64) - lengths
    num_frames = int(lengths.sum(dtype=np.int64))
    num_buckets = max(1, min(num_buckets, num_frames // (BATCHES_PER_BUCKET * max_frames)))
    return frames_before * num_buckets // num_frames


def _cut_ascending(lengths: np.ndarray, max_frames: int) -> list[tuple[int, int]]:
    """Cut ascending lengths (N,) into batches [begin, end) within `max_frames` when padded."""
    cuts, begin = [], 0
    for position, length in enumerate(lengths.tolist()):
        if length * (position + 1 - begin) > max_frames:
            cuts.append((begin, position))
            begin = position
    return [*cuts, (begin, len(lengths))]


def _split_evenly(cuts: list[tuple[int, int]], world_size: int) -> np.ndarray:
    """Halve the largest batches until all processes get equally many: (batches, 2)."""
    cuts = list(cuts)
    while len(cuts) % world_size:
        largest = max(range(len(cuts)), key=lambda position: cuts[position][1] - cuts[position][0])
        begin, end = cuts[largest]
        middle = (begin + end + 1) // 2
        cuts[largest : largest + 1] = [(begin, middle), (middle, end)]
    return np.array(cuts)
