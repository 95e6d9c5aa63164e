"""Tests of datamodule/av_dataset.py."""

import logging

import numpy as np
import pytest
import torch
from media_files import make_picture, make_speech, write_sound_track

from datamodule.av_dataset import AVDataset
from datamodule.label_list import LabelList
from datamodule.loaders import collate_pad
from datamodule.media import MediaError, read_audio, read_video, write_audio, write_video
from datamodule.noise import BabbleNoise
from datamodule.transforms import AudioTransform, VideoTransform


class Letters:
    """A vocabulary of letters: blank, a to z, <eos>."""

    odim = 28

    def tokenize(self, text):
        return torch.tensor([ord(c) - 96 for c in text if "a" <= c <= "z"], dtype=torch.int64)

    def post_process(self, ids):
        return "".join(chr(96 + index) for index in ids)


@pytest.fixture
def make_dataset(corpus, text_transform):
    def make(file="ids.csv", *, subset="val", streams=("video", "audio"), **kwargs):
        labels = LabelList(str(corpus.root), file)
        if "video" in streams:
            kwargs.setdefault("video_transform", VideoTransform(subset=subset, crop_size=24))
        if "audio" in streams:
            kwargs.setdefault("audio_transform", AudioTransform(subset=subset, normalize=False))
        kwargs.setdefault("text_transform", text_transform)
        return AVDataset(labels=labels, training=subset == "train", **kwargs)

    return make


@pytest.mark.parametrize("streams", [("video",), ("audio",), ("video", "audio")])
def test_items(make_dataset, corpus, text_transform, streams):
    dataset = make_dataset(streams=streams)
    assert len(dataset) == 5
    for index in range(5):
        item = dataset[index]
        length = corpus.num_frames[index]
        path = corpus.root / "set" / "clips" / f"{index}.mp4"
        assert set(item) == {*streams, "target", "index"}
        assert item["index"] == index
        assert torch.equal(item["target"], text_transform.tokenize(corpus.texts[index]))
        assert dataset.text(index) == corpus.texts[index]
        assert dataset.path(index) == str(path)
        assert dataset.utterance_id(index) == f"set/clips/{index}"
        if "video" in streams:
            expected = VideoTransform(subset="val", crop_size=24)(read_video(path))
            assert torch.equal(item["video"], expected)
        if "audio" in streams:
            expected = read_audio(path.with_suffix(".wav")).unsqueeze(1)
            expected = expected if len(streams) == 1 else expected[: 640 * length]
            assert torch.equal(item["audio"], expected)


def test_plain_text_gives_the_same_targets(make_dataset):
    ids, text = make_dataset("ids.csv"), make_dataset("text.csv")
    for index in range(5):
        assert torch.equal(ids[index]["target"], text[index]["target"])
        assert ids.text(index) == text.text(index)


def test_ids_of_one_vocabulary_become_ids_of_another(make_dataset, text_transform):
    dataset = make_dataset(text_transform=Letters(), id_text_transform=text_transform)
    for index in range(5):
        assert torch.equal(dataset.target(index), Letters().tokenize(dataset.text(index)))


@pytest.mark.parametrize("others", ["text.csv", "ids.csv"])
def test_silence_has_an_empty_target(make_dataset, corpus, others):
    rows = (corpus.root / "labels" / others).read_text().splitlines()
    dataset = make_dataset(corpus.write_list("silence.csv", [*rows, "set,clips/0.mp4,20,"]))
    assert dataset.reference(5) == ""
    batch = collate_pad([dataset[5], dataset[0]])
    assert batch["target_lengths"].tolist() == [0, len(dataset.target(0))]
    assert (batch["targets"][0] == -1).all()
    assert collate_pad([dataset[5]])["targets"].shape == (1, 0)


def test_ids_outside_the_vocabulary(make_dataset):
    with pytest.raises(ValueError, match=r"ids.csv, line \d: token id \d+ is outside .* 1 to 26"):
        make_dataset(text_transform=Letters())


def test_text_without_tokens(make_dataset, corpus):
    corpus.write_list("odd.csv", ["set,clips/0.mp4,20,!?"])
    dataset = make_dataset("odd.csv", text_transform=Letters())
    with pytest.raises(ValueError, match=r"odd.csv, line 1: the text '!\?' gives no token"):
        dataset[0]


def test_sound_track_of_the_video(make_dataset, corpus):
    path = corpus.root / "set" / "clips" / "0.mp4"
    samples = np.sin(np.arange(640 * 20) / 20)[None].astype(np.float32) * 0.5
    write_sound_track(path, samples, frames=make_picture(20))
    path.with_suffix(".wav").unlink()
    item = make_dataset()[0]
    assert item["audio"].shape == (640 * 20, 1)
    level = item["audio"][3000:9000].square().mean().sqrt().item()
    assert level == pytest.approx(0.5 / 2**0.5, rel=0.05)


@pytest.mark.parametrize("extra", [-3200, -1, 0, 1, 3200])
def test_audio_is_fitted_to_the_video(make_dataset, corpus, extra):
    samples = make_speech(640 * 20 + extra)
    write_audio(corpus.root / "set" / "clips" / "0.wav", samples)
    audio = make_dataset()[0]["audio"].squeeze(1)
    expected = np.zeros(640 * 20, np.float32)
    expected[: len(samples)] = samples[: len(expected)]
    np.testing.assert_allclose(audio.numpy(), expected, atol=1 / 32768)


@pytest.mark.parametrize("extra", [-3201, 3201])
def test_streams_of_different_length(make_dataset, corpus, extra):
    write_audio(corpus.root / "set" / "clips" / "0.wav", make_speech(640 * 20 + extra))
    with pytest.raises(MediaError, match=r"0.mp4: the video lasts 0.80 s and the audio \d"):
        make_dataset()[0]
    assert make_dataset(streams=("audio",))[0] is not None


@pytest.mark.parametrize("streams", [("video",), ("audio",)])
def test_training_items_depend_on_seed_epoch_and_index(make_dataset, corpus, streams):
    def make(seed):
        noise = BabbleNoise(LabelList(str(corpus.root), "ids.csv"), seed=0)
        transform = AudioTransform(subset="train", noise=noise) if "audio" in streams else None
        return make_dataset(subset="train", streams=streams, audio_transform=transform, seed=seed)

    stream = streams[0]
    first = make(1)[2, 3][stream]
    dataset = make(1)
    for key in [(0, 0), (1, 3)]:
        dataset[key]
    assert torch.equal(dataset[2, 3][stream], first)
    assert not torch.equal(dataset[2, 4][stream], first)
    assert not torch.equal(make(2)[2, 3][stream], first)


def test_test_noise_depends_on_seed_and_utterance_only(make_dataset, corpus):
    def make(seed, file="ids.csv", streams=("audio",)):
        noise = BabbleNoise(LabelList(str(corpus.root), "ids.csv"), seed=0)
        transform = AudioTransform(subset="test", noise=noise, snr_target=0)
        return make_dataset(
            file, subset="test", streams=streams, audio_transform=transform, seed=seed
        )

    rows = (corpus.root / "labels" / "ids.csv").read_text().splitlines()
    corpus.write_list("reversed.csv", rows[::-1])
    first = make(1)[1]["audio"]
    assert torch.equal(make(1)[1, 7]["audio"], first)
    assert torch.equal(make(1, file="reversed.csv")[3]["audio"], first)
    assert not torch.equal(make(2)[1]["audio"], first)


def test_bad_clips(make_dataset, corpus, caplog):
    path = corpus.root / "set" / "clips" / "1.mp4"
    path.unlink()
    with pytest.raises(MediaError, match=r"1.mp4: no such file"):
        make_dataset()[1]
    with caplog.at_level(logging.WARNING):
        assert make_dataset(skip_bad_clips=True)[1] is None
    assert caplog.messages == [f"skipped a bad clip: {path}: no such file"]
    assert make_dataset(streams=("audio",))[1] is not None


def test_frames_smaller_than_the_crop(make_dataset, corpus):
    write_video(corpus.root / "set" / "clips" / "0.mp4", make_picture(20, size=16))
    with pytest.raises(ValueError, match=r"0.mp4: got frames of 16x16 pixels"):
        make_dataset(skip_bad_clips=True)[0]


def test_no_stream(make_dataset):
    with pytest.raises(ValueError, match="expected one or both"):
        make_dataset(streams=())
