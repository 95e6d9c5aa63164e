"""Tests of datamodule/data_module.py."""

import logging
import multiprocessing
import re
import types
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from media_files import make_speech

from datamodule import sources
from datamodule.data_module import DataModule
from datamodule.media import MediaError, write_audio
from datamodule.noise import BabbleNoise, FileNoise
from datamodule.options import DataOptions
from espnet.option_tree import from_flat, names


@pytest.fixture
def make(corpus, text_transform):
    def make_data_module(**kwargs):
        kwargs = {
            "root_dir": str(corpus.root),
            "streams": ("video", "audio"),
            "text_transform": text_transform,
            "train_file": "ids.csv",
            "val_file": "ids.csv",
            "test_file": "text.csv",
            "max_frames": 80,
            "crop_size": 24,
            "num_workers": 0,
            **kwargs,
        }
        given = {name: kwargs.pop(name) for name in names(DataOptions) & kwargs.keys()}
        return DataModule(from_flat(DataOptions, given), **kwargs)

    return make_data_module


def indices_of(loader):
    return [index for batch in loader for index in batch["indices"].tolist()]


class Recorder(pl.LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.validated = []

    def training_step(self, batch):
        self.seen.append((self.current_epoch, batch["indices"].tolist(), batch["audios"].sum()))
        return self.weight * 0

    def validation_step(self, batch):
        self.validated.extend(batch["indices"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(pl.Callback):
    """Stops after a number of steps and saves a checkpoint."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            raise KeyboardInterrupt


def fit(data, *, ckpt_path=None, callbacks=(), **kwargs):
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **{"max_epochs": 3, "num_sanity_val_steps": 0, **kwargs},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        except (KeyboardInterrupt, SystemExit):
            if not callbacks:
                raise
    return model


@pytest.mark.parametrize("num_workers", [0, 1])
def test_fit_loaders(make, corpus, num_workers):
    data = make(num_workers=num_workers, max_frames=72)
    data.setup("fit")
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        assert sorted(indices_of(loader)) == [0, 1, 2, 3, 4]
    batches = list(data.val_dataloader())
    assert [batch["indices"].tolist() for batch in batches] == [[4, 3], [2, 1], [0]]
    assert batches[0]["video_lengths"].tolist() == [36, 32]
    assert batches[0]["videos"].shape == (2, 36, 1, 24, 24)
    assert batches[0]["audio_lengths"].tolist() == [36 * 640, 32 * 640]
    assert data.train_dataset.text(0) == corpus.texts[0]


def test_each_epoch_is_announced_and_redrawn(make):
    seen = fit(make()).seen
    assert [epoch for epoch, _, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for epoch in range(3):
        indices = [index for number, batch, _ in seen if number == epoch for index in batch]
        assert sorted(indices) == [0, 1, 2, 3, 4]
    assert len({str([batch[1] for batch in seen[at : at + 3]]) for at in (0, 3, 6)}) == 3
    assert len({float(total) for _, _, total in seen}) == 9


def test_validation_sees_every_utterance_once_an_epoch(make):
    assert sorted(fit(make(), max_epochs=2).validated) == sorted([0, 1, 2, 3, 4] * 2)


def test_no_validation_list(make):
    assert fit(make(val_file=None)).validated == []


@pytest.mark.parametrize(("step", "num_workers"), [(1, 0), (2, 1), (3, 0), (4, 0)])
def test_resume_gives_the_batches_of_an_uninterrupted_run(make, tmp_path, step, num_workers):
    path = str(tmp_path / "stop.ckpt")
    whole = fit(make(num_workers=num_workers)).seen
    part = fit(make(num_workers=num_workers), callbacks=[Stop(step, path)]).seen
    rest = fit(make(num_workers=num_workers), ckpt_path=path).seen
    assert len(part) == step
    assert str(part + rest) == str(whole)


def test_overfitting_repeats_the_batches_of_one_epoch(make):
    seen = fit(make(), overfit_batches=1).seen
    assert len(seen) == 3
    assert len({str(entry[1:]) for entry in seen}) == 1


def test_processes_share_the_utterances(make):
    parts, validated = [], []
    for rank in range(2):
        data = make()
        data.setup("fit")
        data.trainer = types.SimpleNamespace(global_rank=rank, world_size=2, overfit_batches=0)
        parts.append([batch["indices"].tolist() for batch in data.train_dataloader()])
        validated += indices_of(data.val_dataloader())
    assert len(parts[0]) == len(parts[1])
    assert sorted(sum(parts[0] + parts[1], [])) == [0, 1, 2, 3, 4]
    assert sorted(validated) == [0, 1, 2, 3, 4]


def test_test_loaders_of_several_snrs(make, tmp_path):
    write_audio(tmp_path / "noise.wav", make_speech(3000, seed=9))
    noise_files = [str(tmp_path / "noise.wav")]

    def load(snr_target, seed=0):
        data = make(
            noise_file=noise_files, snr_targets=(999999, 10, 0), seed=seed, audio_normalize=False
        )
        data.setup("test")
        return torch.cat([b["audios"].flatten() for b in data.test_dataloader(snr_target)])

    clean = load(None)
    assert torch.equal(clean, load(999999))
    assert torch.equal(load(0), load(0))
    assert not torch.equal(load(0), load(0, seed=1))
    ratio = clean.square().sum() / (load(10) - clean).square().sum()
    assert 10 * torch.log10(ratio).item() == pytest.approx(10, abs=0.01)
    ratio = clean.square().sum() / (load(0) - clean).square().sum()
    assert 10 * torch.log10(ratio).item() == pytest.approx(0, abs=0.01)


def test_noise_sources(make, tmp_path):
    data = make()
    data.setup("fit")
    noise = data.train_dataset.audio_transform.noise
    assert isinstance(noise, BabbleNoise)
    assert data.val_dataset.audio_transform.noise is None
    write_audio(tmp_path / "noise.wav", make_speech(100))
    data = make(noise_file=[str(tmp_path / "noise.wav")])
    data.setup("fit")
    assert isinstance(data.train_dataset.audio_transform.noise, FileNoise)
    data = make(train_file=None, snr_targets=(0,))
    data.setup("test")
    assert isinstance(data.test_datasets[0].audio_transform.noise, BabbleNoise)
    assert len(indices_of(data.test_dataloader())) == 5
    data = make(streams=("video",), noise_file=["none.wav"])
    data.setup()
    assert data.train_dataset.audio_transform is None


@pytest.mark.parametrize("copies", [1, 3])
def test_babble_of_one_clip(make, corpus, caplog, copies):
    row = (corpus.root / "labels" / "ids.csv").read_text().splitlines()[0]
    corpus.write_list("one.csv", [row] * copies)
    data = make(train_file="one.csv", snr_targets=(999999, -20))
    data.setup("fit")
    assert f"training without noise: {corpus.root}/set/clips/0.mp4 is the only" in caplog.text
    assert sorted(indices_of(data.train_dataloader())) == list(range(copies))
    with pytest.raises(ValueError, match=r"clips/0.mp4 is the only clip .*--noise-file"):
        data.setup("test")  # the test list holds it
    rows = (corpus.root / "labels" / "text.csv").read_text().splitlines()
    corpus.write_list("others.csv", rows[1:])
    data = make(train_file="one.csv", test_file="others.csv", snr_targets=(-20,))
    data.setup("test")
    assert len(indices_of(data.test_dataloader())) == 4


def test_lists_are_read_once_and_only_those_needed(make, corpus):
    data = make(test_file="none.csv")
    data.setup("fit")
    dataset = data.train_dataset
    (corpus.root / "labels" / "ids.csv").unlink()
    data.setup("fit")
    assert data.train_dataset is dataset
    with pytest.raises(ValueError, match=r"none.csv: cannot read"):
        data.setup("test")


def test_missing_list(make):
    with pytest.raises(ValueError, match="got no train list, expected a file name"):
        make(train_file=None).setup("fit")
    with pytest.raises(ValueError, match="got no test list, expected a file name"):
        make(test_file=None).setup("test")


def test_missing_noise_file(make):
    with pytest.raises(MediaError, match=r"none.wav: no such file"):
        make(noise_file=["none.wav"]).setup("fit")
    with pytest.raises(MediaError, match=r"none.wav: no such file"):
        make(noise_file=["none.wav"], snr_targets=(999999, 0)).setup("test")
    make(noise_file=["none.wav"]).setup("test")


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_clips_longer_than_max_frames(make, stage):
    with pytest.raises(ValueError, match=r"csv, line 4: got a clip of 32 frames.* at most 30"):
        make(max_frames=30).setup(stage)


def test_training_can_skip_clips_that_are_too_long(make, caplog):
    data = make(max_frames=30, val_file=None, skip_bad_clips=True)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert "left out 2 clips that are too long" in caplog.text
    assert sorted(indices_of(data.train_dataloader())) == [0, 1, 2]
    with pytest.raises(ValueError, match="line 4: got a clip of 32 frames"):
        data.setup("test")
    with pytest.raises(ValueError, match="line 1: got a clip of 20 frames"):
        make(max_frames=10, val_file=None, skip_bad_clips=True).setup("fit")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_clips(make, corpus, num_workers):
    (corpus.root / "set" / "clips" / "2.mp4").write_bytes(b"")
    data = make(num_workers=num_workers)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        with pytest.raises(MediaError, match=r"2.mp4: the file is empty$"):
            list(loader)
    data = make(num_workers=num_workers, skip_bad_clips=True)
    data.setup()
    batches = list(data.train_dataloader())
    assert sorted(indices_of(batches)) == [0, 1, 3, 4]
    assert sum(batch["num_bad_clips"] for batch in batches) == 1
    batches = list(data.val_dataloader())
    assert sorted(indices_of(batches)) == [0, 1, 3, 4]
    (clip,) = sum((batch.get("bad_clips", []) for batch in batches), [])
    assert (clip.index, clip.cause) == (2, "the file is empty")
    with pytest.raises(MediaError, match=r"2.mp4: the file is empty$"):
        list(data.test_dataloader())


def test_batches_to_decode_name_bad_clips(make, corpus):
    (corpus.root / "set" / "clips" / "2.mp4").write_bytes(b"")
    data = make()
    data.setup("test")
    batches = list(data.test_dataloader(indices=np.array([1, 2, 4]), to_decode=True))
    assert sorted(indices_of(batches)) == [1, 4]
    assert [clip.index for batch in batches for clip in batch.get("bad_clips", [])] == [2]
    assert not any("targets" in batch for batch in batches)


def test_texts_are_checked_at_setup(make, corpus, caplog):
    rows = [f"set,clips/{i}.mp4,{20 + 4 * i},{text}" for i, text in enumerate(["a", "b " * 9, "c"])]
    corpus.write_list("long.csv", rows)
    given = {"train_file": "long.csv", "val_file": "long.csv", "most_tokens": lambda _: 8}
    with pytest.raises(MediaError, match=r"long.csv, line 2: the text has \d+ tokens, .* most 8"):
        make(**given).setup("fit")
    data = make(**given, skip_bad_clips=True)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert "left out 1 clip: 1 as" in caplog.text
    assert sorted(indices_of(data.train_dataloader())) == [0, 2]
    assert sorted(indices_of(data.val_dataloader())) == [0, 2]


def test_spawned_workers_give_the_same_batches(make):
    data = make(num_workers=1)
    data.setup("fit")
    expected = list(data.train_dataloader())
    loader = data.train_dataloader()
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    for batch, other in zip(loader, expected, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in ("videos", "audios"))


def test_what_a_list_holds_is_told_once(make, caplog, sp_model_path):
    caplog.set_level(logging.INFO)
    data = make(snr_targets=(0.0, 999999))
    data.setup()
    folder = Path(sp_model_path).parent.name
    expected = {"ids.csv": f"token ids of {folder}/bpe", "text.csv": "text"}
    assert data.contents == expected
    told = [record.message for record in caplog.records if ".csv: " in record.message]
    assert told == [f"{file}: {what}" for file, what in expected.items()]


@pytest.mark.parametrize("label_format", ["auto", "ids", "text"])
def test_digits_are_what_the_option_says(make, corpus, label_format):
    rows = [f"set,clips/{index}.mp4,20,2 3 8" for index in range(2)]
    data = make(train_file=corpus.write_list("digits.csv", rows), label_format=label_format)
    if label_format == "auto":
        with pytest.raises(ValueError, match=r"digits.csv, line 1: .* give --label-format"):
            data.setup("fit")
    elif label_format == "ids":
        data.setup("fit")
        assert data.train_dataset.target(0).tolist() == [2, 3, 8]
    else:
        with pytest.raises(ValueError, match=r"the model's vocabulary cannot write '2'"):
            data.setup("fit")


@pytest.mark.parametrize("change", [str.upper, partial(re.sub, "[a-z]", "\u0440")])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_text_of_another_vocabulary_is_refused(make, corpus, change, stage):
    rows = [f"set,clips/{n}.mp4,20,{change(text)}" for n, text in enumerate(corpus.texts)]
    name = corpus.write_list("other.csv", rows)
    data = make(train_file=name, test_file=name, val_file=None)
    message = r"other.csv, line 1: .* cannot write '.*'; \d+.\d% of .*--sp-model-path"
    with pytest.raises(ValueError, match=message) as error:
        data.setup(stage)
    assert "\n" not in str(error.value)


def test_a_few_unknown_letters_are_told(make, corpus, caplog, text_transform):
    texts = [*corpus.texts[:4], f"{corpus.texts[4]} Q"]
    rows = [f"set,clips/{n}.mp4,20,{text}" for n, text in enumerate(texts)]
    make(train_file=corpus.write_list("few.csv", rows), val_file=None).setup("fit")
    (record,) = caplog.records
    tokens = torch.cat([text_transform.tokenize(text) for text in texts])
    share = 100 * int((tokens == 1).sum()) / len(tokens)
    assert (
        f"few.csv, line 5: the model's vocabulary cannot write 'Q'; {share:.1f}%" in record.message
    )


def test_ids_of_unknown_letters_count_too(make, corpus):
    rows = [f"set,clips/{n}.mp4,20,1 12 1 13" for n in range(5)]
    name = corpus.write_list("unknown.csv", rows)
    with pytest.raises(ValueError, match=r"cannot write '<unk>'; 50.0% of the tokens"):
        make(train_file=name, val_file=None, label_format="ids").setup("fit")


def test_only_a_test_list_may_lack_transcripts(make, corpus):
    rows = [f"set,clips/{n}.mp4,{20 + 4 * n}" for n in range(5)]
    name = corpus.write_list("clips.csv", rows)
    data = make(test_file=name)
    data.setup("test")
    assert data.contents == {name: "no transcripts"}
    (batch,) = data.test_dataloader()
    assert batch["targets"].shape == (5, 0)
    for subset in ("train", "val"):
        with pytest.raises(ValueError, match=rf"clips.csv has no transcripts, which {subset} "):
            make(**{f"{subset}_file": name}).setup("fit")


@pytest.mark.parametrize("streams", [(), ("lidar",)])
def test_unknown_streams(make, streams):
    with pytest.raises(ValueError, match=r"expected some of \('video', 'audio'\)"):
        make(streams=streams)


@pytest.fixture
def folders(corpus):
    """A list of empty files in two folders, twenty to a folder; the folders take turns."""
    rows = []
    for row in range(40):
        path = corpus.root / "set" / f"{row % 2}" / f"{row}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        rows.append(f"set,{row % 2}/{row}.mp4,20,bin")
    corpus.write_list("folders.csv", rows)
    return corpus.root / "set"


@pytest.mark.parametrize("streams", [("video",), ("audio",), ("video", "audio")])
def test_the_first_missing_file_is_named(make, folders, streams):
    data = {"train_file": "folders.csv", "val_file": None, "streams": streams}
    make(**data).setup("fit")
    (folders / "1" / "7.mp4").unlink()
    (folders / "0" / "8.mp4").unlink()
    (folders / "0" / "8.mp4").mkdir()
    (folders / "0" / "12.mp4").unlink()
    for name, line in [("1/7", 8), ("0/8", 9), ("0/12", 13)]:
        message = rf"{name}.mp4: it does not exist, but .*folders.csv, line {line} names it"
        with pytest.raises(MediaError, match=message):
            make(**data).setup("fit")
        if (folders / f"{name}.mp4").is_dir():
            (folders / f"{name}.mp4").rmdir()
        (folders / f"{name}.mp4").touch()
    make(**data).setup("fit")


def test_a_link_to_nothing_and_a_missing_folder_are_missing_files(make, folders):
    data = {"train_file": "folders.csv", "val_file": None}
    clip = folders / "1" / "7.mp4"
    clip.rename(folders / "clip.mp4")
    clip.symlink_to(folders / "clip.mp4")
    make(**data).setup("fit")
    (folders / "clip.mp4").unlink()
    with pytest.raises(MediaError, match=r"1/7.mp4: it does not exist, but .* line 8 names it"):
        make(**data).setup("fit")
    (folders / "0").rename(folders / "2")
    with pytest.raises(MediaError, match=r"0/0.mp4: it does not exist, but .* line 1 names it"):
        make(**data).setup("fit")


@pytest.mark.parametrize("most_listed", [0, 1, 8])
def test_files_in_crowded_folders_are_found_too(make, folders, monkeypatch, most_listed):
    monkeypatch.setattr(sources, "MOST_LISTED", most_listed)
    for number in range(200):
        (folders / "0" / f"other{number}.mp4").touch()
    data = {"train_file": "folders.csv", "val_file": None}
    make(**data).setup("fit")
    (folders / "0" / "8.mp4").unlink()
    with pytest.raises(MediaError, match=r"0/8.mp4: it does not exist"):
        make(**data).setup("fit")


@pytest.mark.parametrize("streams", [("video",), ("audio",), ("video", "audio")])
def test_clips_in_other_spellings(make, corpus, streams):
    clips = corpus.root / "set" / "clips"
    data = {"train_file": "text.csv", "val_file": None, "streams": streams}
    names = ["0", "Zoe\u0308", "2", "Zo\u00eb3", "4"]  # on the disk
    for index, name in enumerate(names):
        for old, new in ((".mp4", ".MP4"), (".wav", ".WAV" if index else ".wav")):
            (clips / f"{index}{old}").rename(clips / f"{name}{new}")
    rows = (corpus.root / "labels" / "text.csv").read_text()
    rows = rows.replace("clips/1", "clips/Zo\u00eb").replace("clips/3", "clips/Zoe\u03083")
    corpus.write_list("text.csv", rows.splitlines())
    module = make(**data)
    module.setup("fit")
    assert sorted(indices_of(module.train_dataloader())) == [0, 1, 2, 3, 4]
    (clips / "Zo\u00eb3.MP4").rename(clips / "gone")
    (clips / "Zo\u00eb3.WAV").unlink()
    message = r"it does not exist, but .*text.csv, line 4 names it \(spelled '.*Zoe\\u03083.mp4'\)"
    with pytest.raises(MediaError, match=message):
        make(**data).setup("fit")


def test_a_wav_stands_for_a_video_where_there_is_only_audio(make, folders):
    (folders / "1" / "7.mp4").rename(folders / "1" / "7.wav")
    data = {"train_file": "folders.csv", "val_file": None}
    make(**data, streams=("audio",)).setup("fit")
    with pytest.raises(MediaError, match=r"1/7.mp4: it does not exist"):
        make(**data).setup("fit")
