"""Tests of datamodule/samplers.py."""

import time

import numpy as np
import pytest

from datamodule.samplers import LengthBucketBatchSampler, LongestFirstBatchSampler

MAX_FRAMES = 400


def draw_lengths(number, seed=0):
    return np.random.default_rng(seed).integers(20, 201, number).astype(np.int32)


def make(lengths, **kwargs):
    kwargs = {"max_frames": MAX_FRAMES, "num_buckets": 400, "seed": 0, **kwargs}
    return LengthBucketBatchSampler(lengths, **kwargs)


def keys_of_all_ranks(lengths, world_size, *, epoch=0, **kwargs):
    samplers = [
        make(lengths, rank=rank, world_size=world_size, **kwargs) for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert {len(part) for part in batches} == {len(samplers[0])}
    return batches


@pytest.mark.parametrize("number", [3, 50, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_buckets", [1, 400])
def test_every_utterance_once_within_max_frames(number, world_size, num_buckets):
    lengths = draw_lengths(number)
    for epoch in range(3):
        batches = keys_of_all_ranks(lengths, world_size, epoch=epoch, num_buckets=num_buckets)
        keys = [key for part in batches for batch in part for key in batch]
        assert sorted(keys) == [(index, epoch) for index in range(number)]
        for part in batches:
            for batch in part:
                longest = max((lengths[index] for index, _ in batch), default=0)
                assert longest * len(batch) <= MAX_FRAMES


def test_batches_hold_similar_lengths_and_are_full():
    lengths = draw_lengths(2000)
    batches = list(make(lengths))
    padded = sum(max(lengths[index] for index, _ in batch) * len(batch) for batch in batches)
    assert padded < 1.05 * lengths.sum()
    assert len(batches) < 1.4 * lengths.sum() / MAX_FRAMES
    unsorted = list(make(lengths, num_buckets=1))
    assert len(unsorted) > 1.3 * len(batches)


@pytest.mark.parametrize("number", [20, 1000])
def test_epochs_differ_and_repeat_with_the_seed(number):
    lengths = draw_lengths(number)

    def draw(seed, epoch):
        sampler = make(lengths, seed=seed)
        sampler.set_epoch(epoch)
        return [[index for index, _ in batch] for batch in sampler]

    first = draw(0, 0)
    assert draw(0, 0) == first
    compositions = {frozenset(map(frozenset, draw(*key))) for key in [(0, 0), (0, 1), (1, 0)]}
    assert len(compositions) == 3
    assert {len(draw(0, epoch)) for epoch in range(10)} == {len(first)}


def test_steps_are_shuffled():
    lengths = draw_lengths(1000)
    longest = [max(lengths[index] for index, _ in batch) for batch in make(lengths)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def test_processes_get_similar_lengths_at_each_step():
    lengths = draw_lengths(2000)
    first, second = keys_of_all_ranks(lengths, 2)
    frames = [
        [max(lengths[index] for index, _ in batch) for batch in part] for part in (first, second)
    ]
    assert np.abs(np.subtract(*frames)).max() <= 10


def test_start_in_the_middle_of_an_epoch():
    sampler = make(draw_lengths(100))
    sampler.set_epoch(2)
    batches = list(sampler)
    sampler.set_epoch(2, start_batch=3)
    assert list(sampler) == batches[3:]
    assert len(sampler) == len(batches)
    sampler.set_epoch(2)
    assert list(sampler) == batches


def test_without_redraw_epochs_are_equal():
    sampler = make(draw_lengths(100), redraw=False)
    first = list(sampler)
    sampler.set_epoch(5)
    assert list(sampler) == first


def test_indices_leave_utterances_out():
    lengths = draw_lengths(100)
    lengths[7] = MAX_FRAMES + 1
    indices = np.delete(np.arange(100), 7)
    batches = list(make(lengths, indices=indices))
    assert sorted(index for batch in batches for index, _ in batch) == indices.tolist()


def test_utterances_that_cannot_be_paired_leave_a_batch_empty():
    lengths = np.full(5, MAX_FRAMES)
    batches = keys_of_all_ranks(lengths, 2)
    assert sorted(len(batch) for part in batches for batch in part) == [0, 1, 1, 1, 1, 1]


def test_lightning_finds_set_epoch():
    sampler = make(draw_lengths(10))
    sampler.sampler.set_epoch(4)
    assert sampler.epoch == 4


def test_errors():
    with pytest.raises(ValueError, match="got 3 training utterances for 4 processes"):
        make(draw_lengths(3), world_size=4)
    with pytest.raises(ValueError, match="got an utterance of 200 frames, expected at most 199"):
        make(np.array([200]), max_frames=199)


def test_evaluation_gives_an_utterance_beyond_the_limit_a_batch_of_its_own():
    batches = list(LongestFirstBatchSampler(np.array([80, 200, 90]), max_frames=199))
    assert batches == [[(1, 0)], [(2, 0), (0, 0)]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_utterance_once_longest_first(world_size):
    lengths = draw_lengths(101)
    parts = [
        list(
            LongestFirstBatchSampler(
                lengths, max_frames=MAX_FRAMES, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    keys = sorted(key for part in parts for batch in part for key in batch)
    assert keys == [(index, 0) for index in range(101)]
    for part in parts:
        longest = [max(lengths[index] for index, _ in batch) for batch in part]
        assert longest == sorted(longest, reverse=True)
        assert all(top * len(batch) <= MAX_FRAMES for top, batch in zip(longest, part, strict=True))


def test_a_million_utterances():
    lengths = draw_lengths(1_000_000)
    start = time.perf_counter()
    batch = next(iter(make(lengths, max_frames=1600)))
    assert len(batch) >= 8
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("number", [3, 50, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_buckets", [1, 400])
def test_no_draw_has_a_larger_batch_than_the_largest(number, world_size, num_buckets):
    lengths = draw_lengths(number)
    samplers = [
        make(lengths, rank=rank, world_size=world_size, num_buckets=num_buckets)
        for rank in range(world_size)
    ]

    def sizes(batch):
        longest = max((int(lengths[index]) for index, _ in batch), default=0)
        return len(batch) * longest, len(batch) * longest**2

    found = [sampler.largest_batches() for sampler in samplers]
    assert len({len(part) for part in found}) == 1  # All processes try equally many.
    steps = list(zip(*found, strict=True))
    largest = [max(sizes(batch)[kind] for step in steps for batch in step) for kind in (0, 1)]
    assert largest[0] <= MAX_FRAMES
    drawn = [
        sizes(batch)
        for epoch in range(20)
        for part in keys_of_all_ranks(lengths, world_size, epoch=epoch, num_buckets=num_buckets)
        for batch in part
    ]
    assert [max(sizes[kind] for sizes in drawn) <= largest[kind] for kind in (0, 1)] == [True] * 2
    assert all(len(set(batch)) == len(batch) for step in steps for batch in step)


def test_largest_batches_are_the_longest_of_their_bucket():
    lengths = np.array([40, 100, 100, 40, 40, 100, 40], np.int32)
    batches = make(lengths, max_frames=310, num_buckets=1).largest_batches()
    assert batches == [[(1, 0), (2, 0), (5, 0)]]


def test_most_frames_and_most_attention_may_be_two_batches():
    lengths = np.array([100] * 48 + [290] * 16, np.int32)
    batches = make(lengths, max_frames=300).largest_batches()
    assert [[lengths[i] for i, _ in batch] for batch in batches] == [[100] * 3, [290]]
