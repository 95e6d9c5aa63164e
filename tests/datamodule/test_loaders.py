"""Tests of datamodule/loaders.py."""

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from datamodule import loaders
from datamodule.loaders import ClipLoader, ResumableLoader, collate_pad
from datamodule.media import MediaError
from datamodule.samplers import LengthBucketBatchSampler


class Clips(Dataset):
    """Items that hold their key; number 3 is bad, number 4 raises."""

    def __init__(self, raises=False):
        self.raises = raises

    def __len__(self):
        return 8

    def __getitem__(self, key):
        index, epoch = key
        if index == 3:
            return None
        if index == 4 and self.raises:
            raise MediaError(f"{index}.mp4", "no such file")
        return {"audio": torch.full((2, 1), epoch), "target": torch.tensor([1]), "index": index}


def sampler(**kwargs):
    kwargs = {"max_frames": 2, "num_buckets": 4, "seed": 0, **kwargs}
    return LengthBucketBatchSampler([1] * 8, **kwargs)


def test_collate_pads():
    items = [
        {
            "video": torch.ones(frames, 1, 4, 4) * frames,
            "audio": torch.ones(640 * frames, 1) * frames,
            "target": torch.arange(1, tokens + 1),
            "index": 10 + frames,
        }
        for frames, tokens in [(3, 2), (5, 1), (4, 4)]
    ]
    batch = collate_pad([items[0], None, *items[1:]])
    assert batch["videos"].shape == (3, 5, 1, 4, 4)
    assert batch["audios"].shape == (3, 3200, 1)
    assert batch["video_lengths"].tolist() == [3, 5, 4]
    assert batch["audio_lengths"].tolist() == [1920, 3200, 2560]
    assert batch["targets"].tolist() == [[1, 2, -1, -1], [1, -1, -1, -1], [1, 2, 3, 4]]
    assert batch["target_lengths"].tolist() == [2, 1, 4]
    assert batch["indices"].tolist() == [13, 15, 14]
    assert batch["num_bad_clips"] == 1
    for row, item in enumerate(items):
        frames = len(item["video"])
        assert torch.equal(batch["videos"][row, :frames], item["video"])
        assert not batch["videos"][row, frames:].any()
        assert torch.equal(batch["audios"][row, : 640 * frames], item["audio"])
        assert not batch["audios"][row, 640 * frames :].any()


def test_collate_leaves_out_absent_streams():
    batch = collate_pad([{"audio": torch.ones(5, 1), "target": torch.tensor([1]), "index": 0}])
    assert set(batch) == {
        *("audios", "audio_lengths", "targets", "target_lengths", "indices", "num_bad_clips")
    }


@pytest.mark.parametrize("items", [[], [None, None]])
def test_collate_of_nothing(items):
    batch = collate_pad(items)
    assert set(batch) == {"indices", "num_bad_clips"}
    assert batch["indices"].shape == (0,)
    assert batch["num_bad_clips"] == len(items)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_are_raised_here_in_one_line(num_workers):
    loader = ClipLoader(Clips(raises=True), batch_sampler=sampler(), num_workers=num_workers)
    with pytest.raises(MediaError) as error:
        list(loader)
    assert str(error.value) == "4.mp4: no such file"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_reach_the_items_and_bad_clips_are_counted(num_workers):
    loader = ResumableLoader(
        Clips(), batch_sampler=sampler(), num_workers=num_workers, persistent_workers=True
    )
    for epoch in (0, 1, 5):
        batches = iter(loader)
        loader.batch_sampler.set_epoch(epoch)  # before the first batch, as Lightning does
        batches = list(batches)
        assert len(batches) == len(loader) == 4
        indices = torch.cat([batch["indices"] for batch in batches]).tolist()
        assert sorted(indices) == [0, 1, 2, 4, 5, 6, 7]
        assert sum(batch["num_bad_clips"] for batch in batches) == 1
        assert all((batch["audios"] == epoch).all() for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume(num_workers):
    def make():
        return ResumableLoader(Clips(), batch_sampler=sampler(), num_workers=num_workers)

    def run(loader, epoch):
        loader.batch_sampler.set_epoch(epoch)
        return [batch["indices"].tolist() for batch in loader]

    first, second = run(make(), 1), run(make(), 2)
    loader = make()
    loader.batch_sampler.set_epoch(1)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    assert state == {"epoch": 1, "batches": 1}
    resumed = make()
    resumed.load_state_dict(state)
    assert run(resumed, 1) == first[1:]
    assert resumed.state_dict() == {"epoch": 1, "batches": 4}
    assert run(resumed, 1) == first
    assert run(resumed, 2) == second
    resumed.load_state_dict({"epoch": 1, "batches": 4})  # saved at the end of an epoch
    assert run(resumed, 2) == second


def test_a_batch_of_ones_own_choice():
    loader = ClipLoader(Clips(raises=True), batch_sampler=sampler())
    batch = loader.load([(5, 7), (3, 7)])
    assert batch["indices"].tolist() == [5]
    assert batch["num_bad_clips"] == 1
    assert batch["audios"].unique().tolist() == [7]
    with pytest.raises(MediaError, match="4.mp4: no such file"):
        loader.load([(4, 0)])


def test_workers_outlive_signals_unless_they_come_from_their_parent():
    loader = ClipLoader(Clips(), batch_sampler=sampler(), num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    time.sleep(0.2)
    assert worker.is_alive()
    assert len(list(batches)) == len(loader) - 1
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


def test_workers_do_without_what_macos_lacks(monkeypatch):
    """Blocked signals that nobody waits for would leave workers that cannot be ended."""
    monkeypatch.delattr(signal, "sigwaitinfo")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loaders._prepare_worker(0)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    loader = ClipLoader(Clips(), batch_sampler=sampler(), num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start processes otherwise")
def test_workers_are_forked_whatever_the_default():
    """From Python 3.14 on, the default is forkserver: workers would not share the label lists."""
    loader = ClipLoader(Clips(), batch_sampler=sampler(), num_workers=1)
    assert loader.multiprocessing_context.get_start_method() == "fork"
    assert sum(len(batch["indices"]) for batch in loader) == 7
    assert ClipLoader(Clips(), batch_sampler=sampler()).multiprocessing_context is None


@pytest.mark.parametrize("in_worker", [True, False])
def test_a_worker_pads_in_the_memory_that_it_shares(monkeypatch, in_worker):
    monkeypatch.setattr(loaders, "get_worker_info", lambda: object() if in_worker else None)
    items = [
        {
            "video": torch.randn(length, 1, 4, 6),
            "audio": torch.randn(640 * length, 1),
            "target": torch.randint(1, 9, (8 - length,)),
            "index": length,
        }
        for length in (3, 5, 1)
    ]
    batch = collate_pad(items)
    for name, padding in [("video", 0), ("audio", 0), ("target", -1)]:
        sequences = [item[name] for item in items]
        expected = pad_sequence(sequences, batch_first=True, padding_value=padding)
        torch.testing.assert_close(batch[f"{name}s"], expected, rtol=0, atol=0)
        assert batch[f"{name}s"].is_contiguous()
        assert batch[f"{name}s"].is_shared() == in_worker
