import re

import numpy as np
import pytest

from benchmarks import data
from benchmarks.common import Timing
from benchmarks.data import Work
from datamodule.label_list import LabelList
from datamodule.media import read_audio, read_video, write_audio, write_video
from datamodule.train_tokenizer import train_tokenizer

WORK = Work(rows=50, files=30, touched=20, batches=2, sentences=1, repeats=1)
NUM_FRAMES = (10, 12, 14)


@pytest.fixture(scope="module")
def root_dir(tmp_path_factory):
    """Three clips, and a tokenizer, where the demo corpus has them."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    (root / "set").mkdir()
    (root / "labels").mkdir()
    (root / "spm").mkdir()
    sentences = ["bin blue at a one now", "lay green by b two soon", "set red in c three please"]
    train_tokenizer(sentences, str(root / "spm" / "unigram"), vocab_size=28)
    rows = []
    for index, length in enumerate(NUM_FRAMES):
        pictures = rng.integers(0, 256, (length, 96, 96), np.uint8)
        write_video(root / "set" / f"{index}.mp4", pictures)
        write_audio(root / "set" / f"{index}.wav", rng.normal(0, 0.1, 640 * length))
        rows.append(f"set,{index}.mp4,{length},2 3 4\n")
    (root / "labels" / "train.csv").write_text("".join(rows))
    return str(root)


def test_the_reference_decodes_what_the_dataset_holds(root_dir):
    for index, length in enumerate(NUM_FRAMES):
        stem = f"{root_dir}/set/{index}"
        pictures = data.decode_video(f"{stem}.mp4")
        samples = np.concatenate(data.decode_audio(f"{stem}.wav"), axis=1)[0]
        assert len(pictures) == length
        # The reference leaves the levels as they stand, 16 to 235.
        stretched = (np.clip(np.stack(pictures), 16, 235).astype(int) - 16) * 255 // 219
        np.testing.assert_array_equal(stretched, read_video(f"{stem}.mp4"))
        np.testing.assert_array_equal(samples / 32768, read_audio(f"{stem}.wav"))


def test_both_sides_read_the_same_clips_in_training_mode(root_dir):
    module = data.set_up_clips(root_dir)
    dataset = module.train_dataset
    assert dataset.training
    assert dataset.audio_transform.noise is not None
    batches = [[(2, 0), (0, 0)], [(1, 0)]]
    assert data.load(dataset, batches) == data.decode(dataset, batches) == sum(NUM_FRAMES)


def test_rates_are_those_of_the_clips_in_the_batches(root_dir, monkeypatch):
    def in_turns(functions, *_):
        assert [function() for function in functions] == [sum(NUM_FRAMES)] * 4
        return [Timing(milliseconds, 36) for milliseconds in (30.0, 60.0, 15.0, 40.0)]

    monkeypatch.setattr(data, "time_in_turns", in_turns)
    rows = data.time_clips(root_dir, WORK)
    assert [row.value for row in rows] == pytest.approx([100, 100, 75])
    assert [row.ratio for row in rows] == pytest.approx([0.5, 2, 2 / 3])
    assert [row.target for row in rows] == [1.5, None, None]
    assert rows[0].notes == ["3 clips in 1 batches, 36 frames"]


def test_lists_name_the_files_that_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "FILES_PER_FOLDER", 20)
    data.write_list(str(tmp_path), 50)
    data.write_files(str(tmp_path), 50)
    labels = LabelList(str(tmp_path), "train.csv")
    assert len(labels) == 50
    assert not labels.is_text.any()
    assert all(len(labels.token_ids(row)) == data.TOKENS_PER_ROW for row in range(50))
    named = [labels.path(row) for row in range(50)]
    assert sorted(named) == sorted(map(str, (tmp_path / "set").rglob("*.mp4")))
    assert len(list((tmp_path / "set").iterdir())) == 3
    dataset = data.set_up_list(str(tmp_path), look_for_files=True).train_dataset
    assert data.count_files(dataset) == 50


def test_looking_for_files_is_what_setup_takes_longer(monkeypatch):
    def in_turns(functions, *_):
        results = [function() for function in functions]
        assert [module.options.skip_bad_clips for module in results[:2]] == [False, True]
        times = (5.0, 2.0, 9.0)
        return [Timing(*timing) for timing in zip(times, results, strict=True)]

    monkeypatch.setattr(data, "time_in_turns", in_turns)
    row = data.time_files(WORK)
    assert row.value == pytest.approx(0.003)
    assert row.ratio == pytest.approx(3 / 9)
    assert row.notes == ["looking for a file takes 1e+02 µs, so for a million 1e+02 s"]
    monkeypatch.setattr(data, "count_files", lambda _: 29)
    with pytest.raises(RuntimeError, match="made 30 files, but there are 29"):
        data.time_files(WORK)


def test_memory_of_a_list(tmp_path):
    data.write_list(str(tmp_path), 200_000)
    found = data.measure_list(str(tmp_path), touched=1000)
    assert found["utterances"] + 1 <= 200_000
    assert found["size"] == pytest.approx((tmp_path / "labels/train.csv").stat().st_size / 1e6)
    assert found["peak"] > found["size"] > 20  # The file's bytes are kept.
    assert 0 <= found["private"] < found["size"] / 4


def test_a_corpus_that_is_there_is_kept_and_a_missing_one_made_elsewhere(
    root_dir, tmp_path, monkeypatch
):
    made = []

    def make(folder, **kwargs):
        made.append((folder, kwargs["num_train"]))

    monkeypatch.setattr(data, "make_demo_corpus", make)
    with data.corpus(root_dir, 7) as folder:
        assert folder == root_dir
    assert not made
    with data.corpus(str(tmp_path / "none"), 7) as folder:
        assert made == [(folder, 7)]
    assert not (tmp_path / "none").exists()


def test_prints_a_table(root_dir, tables, monkeypatch):
    monkeypatch.setattr(data, "run_apart", lambda function, *args: function(*args))
    data.main(["--root-dir", root_dir], WORK)
    (table,) = tables()
    assert table.head == ["what", "value", "reference", "ratio", "target"]
    assert [row[0].split(":")[0].split(" (")[0] for row in table.rows] == [
        "first batch, 2 workers",
        "`AVDataset` and `collate_pad`, one process",
        "`AVDataset` and `collate_pad`, one process",
        "one worker of a loader",
        *["list of 50 rows"] * 6,
        "looking for 30 files in `setup`",
    ]
    targets = [re.sub(": (yes|no)$", "", row[4]) for row in table.rows]
    assert [target for target in targets if target] == [
        "at most 5 s",
        "at most 1.5 times",
        "at most 5 s",
        "at most 400 MB",
        "at most 0.1 times",
    ]
