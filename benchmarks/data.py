"""Measures how fast the data arrives: clips, the first batch, and lists of a million rows.

`python benchmarks/data.py [--root-dir DIR]`, in the repository's root, prints a table; a minute or
two on two CPU cores. Clips are those of the demo corpus, or of a small one that is made if there is
none. All that is timed in this process uses one thread, also for decoding.

What a worker does is to read a batch through `AVDataset` (training: masks, crops, noise) and to
pad it. Its reference is the least that any loader has to do: PyAV decodes the same files, the
luma of each frame is copied to an array, and so are the samples. The project reads plain wav
files without PyAV, so a second row is for a reference that decodes the video alone.

A list of a million rows with 20 token ids each is read by `DataModule.setup` in a process of its
own, where files are not looked for. Looking for them is timed with a shorter list of empty files, a
thousand to a folder, beside asking for each of them.
"""

import os
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import memory
from benchmarks.common import CPU, Row, print_report, run_apart, time_in_turns
from datamodule.av_dataset import AVDataset
from datamodule.data_module import DataModule
from datamodule.demo_corpus import make_demo_corpus
from datamodule.loaders import ClipLoader, collate_pad
from datamodule.media import find_audio
from datamodule.options import DataOptions
from datamodule.samplers import Batch
from datamodule.text_transform import TextTransform
from espnet.formats import STREAMS

DECODING_TARGET = 1.5
FIRST_BATCH_S = 5
LIST_S = 5
LIST_MB = 400
SHARE = 0.1  # of a list's size that may become a worker's own
PIECES = 5049  # of auto_avsr
VOCABULARY = SimpleNamespace(odim=PIECES, name="auto_avsr's", token_list=["piece"] * PIECES)
FILES_PER_FOLDER = 1000
TOKENS_PER_ROW = 20
LIST_FILE = "train.csv"


@dataclass(frozen=True)
class Work:
    """How much is measured."""

    rows: int = 1_000_000  # rows of the long list
    files: int = 100_000  # files that are looked for
    touched: int = 20_000  # rows of the long list that a worker reads
    batches: int = 4  # batches of clips
    sentences: int = 60  # training sentences of a corpus that is made
    repeats: int = 5  # rounds of timing


WORK = Work()


@contextmanager
def corpus(root_dir: str, sentences: int) -> Iterator[str]:
    """Names the folder of the demo corpus, or makes one of a few sentences for a while."""
    if (Path(root_dir) / "labels" / LIST_FILE).is_file():
        yield root_dir
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"{root_dir} is not there: making {sentences} sentences...", file=sys.stderr)
        make_demo_corpus(folder, num_train=sentences, num_val=4, num_test=4, progress=False)
        yield folder


def set_up(root_dir: str, text_transform: Any, **options: Any) -> DataModule:
    """Makes the data module of training on a list, with further options, and reads the list."""
    lists = {"train_file": LIST_FILE, "val_file": None, "label_format": "ids"}
    read = DataOptions(root_dir=root_dir, **lists, **options)
    data = DataModule(read, streams=STREAMS, text_transform=text_transform)
    data.setup("fit")
    return data


def set_up_clips(root_dir: str, num_workers: int = 0) -> DataModule:
    """Sets up training on a demo corpus."""
    text_transform = TextTransform(sp_model_path=f"{root_dir}/spm/unigram.model")
    return set_up(root_dir, text_transform, num_workers=num_workers)


def set_up_list(root_dir: str, *, look_for_files: bool) -> DataModule:
    """Sets up training on a list of `write_list`."""
    return set_up(root_dir, VOCABULARY, skip_bad_clips=not look_for_files)


def time_first_batch(root_dir: str) -> Row:
    """Times from asking for a loader with two workers to its first batch."""
    data = set_up_clips(root_dir, num_workers=2)
    start = time.perf_counter()
    next(iter(data.train_dataloader()))
    seconds = time.perf_counter() - start
    return Row("first batch, 2 workers", seconds, target=FIRST_BATCH_S, unit="s")


def time_clips(root_dir: str, work: Work) -> list[Row]:
    """Times what a worker does beside decoding, and a worker with its way to the parent."""
    data = set_up_clips(root_dir)
    dataset = data.train_dataset
    batches = list(islice(data.train_dataloader().batch_sampler, work.batches))
    loader = ClipLoader(dataset, batch_sampler=batches, num_workers=1, persistent_workers=True)
    alternatives = [
        partial(load, dataset, batches),
        partial(decode, dataset, batches),
        partial(decode, dataset, batches, streams=("video",)),
        partial(consume, loader),
    ]
    num_clips = sum(map(len, batches))
    timings = time_in_turns(alternatives, CPU, work.repeats)
    own, bare, bare_video, worker = (1000 * num_clips / t.milliseconds for t in timings)
    what = "`AVDataset` and `collate_pad`, one process"
    notes = [f"{num_clips} clips in {len(batches)} batches, {timings[0].result} frames"]
    compare = partial(Row, unit="clips/s", rate=True)
    return [
        compare(f"{what} (reference: PyAV)", own, bare, DECODING_TARGET, notes=notes),
        compare(f"{what} (reference: PyAV, video alone)", own, bare_video),
        compare("one worker of a loader (reference: PyAV)", worker, bare),
    ]


def load(dataset: AVDataset, batches: list[Batch]) -> int:
    """Reads and pads batches one after the other, and counts their frames."""
    frames = 0
    for keys in batches:
        batch = collate_pad([dataset[key] for key in keys])
        frames += int(batch["video_lengths"].sum())
    return frames


def consume(loader: ClipLoader) -> int:
    """Takes all batches of a loader, and counts their frames."""
    return sum(int(batch["video_lengths"].sum()) for batch in loader)


def decode(dataset: AVDataset, batches: list[Batch], streams: tuple[str, ...] = STREAMS) -> int:
    """Decodes the files of batches with PyAV alone, and counts their frames."""
    frames = 0
    for index, _ in (key for keys in batches for key in keys):
        path = dataset.path(index)
        frames += len(decode_video(path))
        if "audio" in streams:
            decode_audio(find_audio(path))
    return frames


def decode_video(path: str) -> list[np.ndarray]:
    """Decodes a video to the luma of its frames, uint8 (H, W) each, as it stands."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = []
        for frame in container.decode(stream):
            plane = frame.planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            frames.append(rows[: frame.height, : frame.width].copy())
    return frames


def decode_audio(path: str) -> list[np.ndarray]:
    """Decodes a sound to pieces of its samples, (C, S) each, as they stand."""
    with av.open(path) as container:
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        return [frame.to_ndarray() for frame in container.decode(stream)]


def write_list(root_dir: str, rows: int) -> None:
    """Writes a list of token ids, with as many videos to a folder as `write_files` makes."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(25, 400, rows).tolist()
    texts = [
        " ".join(map(str, ids)) for ids in rng.integers(1, 5048, (5000, TOKENS_PER_ROW)).tolist()
    ]
    (Path(root_dir) / "labels").mkdir(parents=True)
    with (Path(root_dir) / "labels" / LIST_FILE).open("w") as file:
        for row, length in enumerate(lengths):
            folder, number = divmod(row, FILES_PER_FOLDER)
            text = texts[row * 7 % len(texts)]
            file.write(f"set,{folder:05}/{number:05}.mp4,{length},{text}\n")


def write_files(root_dir: str, files: int) -> None:
    """Makes empty files for the videos of a list."""
    for row in range(files):
        folder, number = divmod(row, FILES_PER_FOLDER)
        path = Path(root_dir) / "set" / f"{folder:05}"
        if number == 0:
            path.mkdir(parents=True)
        os.close(os.open(path / f"{number:05}.mp4", os.O_CREAT | os.O_WRONLY))


def measure_list(root_dir: str, touched: int) -> dict[str, float]:
    """Reads a list, draws an epoch and lets two workers read rows; for a process of its own.

    Returns:
        Seconds and megabytes by name.
    """
    torch.set_num_threads(1)
    before = memory.forget_peak(CPU)
    seconds = [time.perf_counter()]
    data = set_up_list(root_dir, look_for_files=False)
    seconds.append(time.perf_counter())
    peak = memory.peak(CPU) - before
    sampler = data.train_dataloader().batch_sampler
    seconds.append(time.perf_counter())
    drawn = iter(sampler)
    next(drawn)
    seconds.append(time.perf_counter())
    utterances = sum(map(len, drawn))
    seconds.append(time.perf_counter())
    rows = np.random.default_rng(1).integers(0, len(data.train_dataset), (2, touched))
    workers = DataLoader(_Touch(data.train_dataset, rows), batch_size=None, num_workers=2)
    names = ("load", "sampler", "first_draw", "rest_of_epoch")
    return {
        **dict(zip(names, np.diff(seconds).tolist(), strict=True)),
        "peak": peak / 1e6,
        "size": (Path(root_dir) / "labels" / LIST_FILE).stat().st_size / 1e6,
        "private": max(workers),
        "utterances": utterances,
    }


class _Touch(Dataset):
    """Tells how much private memory reading rows (N, rows) of a list adds, in MB."""

    def __init__(self, dataset: AVDataset, rows: np.ndarray) -> None:
        self._dataset = dataset
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> float:
        before = self._private_memory()
        for index in self._rows[number].tolist():
            self._dataset.path(index)
            self._dataset.target(index)
            self._dataset.labels.num_frames[index]
        return self._private_memory() - before

    @staticmethod
    def _private_memory() -> float:
        return memory.of_process("Private_Clean", "Private_Dirty", file="smaps_rollup") / 1e6


def time_list(work: Work) -> list[Row]:
    """Measures a long list, in processes of their own, and takes the best of two."""
    with tempfile.TemporaryDirectory() as folder:
        write_list(folder, work.rows)
        rounds = [run_apart(measure_list, folder, work.touched) for _ in range(2)]
    best = {name: min(one[name] for one in rounds) for name in rounds[0]}
    rows = f"{work.rows:,} rows"
    title = f"list of {rows}"
    file = [f"the file of {rows} has {best['size']:.0f} MB"]
    own = f"what reading {work.touched:,} of them makes a worker's own (reference: the file)"
    return [
        Row(f"{title}: `setup`", best["load"], target=LIST_S, unit="s"),
        Row(f"{title}: peak memory of `setup`", best["peak"], None, LIST_MB, "MB", notes=file),
        Row(f"{title}: {own}", best["private"], best["size"], SHARE, "MB"),
        Row(f"{title}: making the sampler", best["sampler"], unit="s"),
        Row(f"{title}: drawing an epoch's first batch", best["first_draw"], unit="s"),
        Row(f"{title}: the epoch's other batches", best["rest_of_epoch"], unit="s"),
    ]


def time_files(work: Work) -> Row:
    """Times looking for the files of a list, beside asking for them one by one."""
    with tempfile.TemporaryDirectory() as folder:
        write_list(folder, work.files)
        write_files(folder, work.files)
        alternatives = [
            partial(set_up_list, folder, look_for_files=True),
            partial(set_up_list, folder, look_for_files=False),
            partial(count_files, set_up_list(folder, look_for_files=False).train_dataset),
        ]
        timings = time_in_turns(alternatives, CPU, work.repeats)
    if timings[-1].result != work.files:
        raise RuntimeError(f"made {work.files} files, but there are {timings[-1].result}")
    with_files, without, one_by_one = (timing.milliseconds / 1000 for timing in timings)
    each = 1e6 * (with_files - without) / work.files
    return Row(
        f"looking for {work.files:,} files in `setup` (reference: one by one)",
        with_files - without,
        one_by_one,
        unit="s",
        notes=[f"looking for a file takes {each:.2g} µs, so for a million {each:.2g} s"],
    )


def count_files(dataset: AVDataset) -> int:
    """Asks for the files of a list one by one, and counts those that are there."""
    return sum(os.path.isfile(dataset.path(index)) for index in range(len(dataset)))


def main(argv: list[str] | None = None, work: Work = WORK) -> None:
    """Runs the command line."""
    parser = ArgumentParser(description="Measure how fast the data arrives.")
    parser.add_argument(
        "--root-dir", default="demo_corpus", help="the demo corpus (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with corpus(args.root_dir, work.sentences) as root_dir:
        print_report(CPU, measure(root_dir, work), ("value", "reference"), packages=["av"])


def measure(root_dir: str, work: Work) -> Iterator[Row]:
    """Measures everything."""
    yield time_first_batch(root_dir)  # first, before this process has read any clip
    yield from time_clips(root_dir, work)
    yield from time_list(work)
    yield time_files(work)


if __name__ == "__main__":
    main()
