"""Tests of datamodule/av_dataset.py."""

import logging
import math

import numpy as np
import pytest
import torch
from media_files import make_picture, make_speech, write_flash_and_click, write_sound_track

from datamodule.av_dataset import AVDataset
from datamodule.bad_clip import BadClip
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
    skipping = make_dataset("odd.csv", text_transform=Letters(), skip_bad_clips=True)
    assert skipping[0].cause.startswith("the text '!?' gives no token")
    decoding = make_dataset("odd.csv", text_transform=Letters(), needs_target=False)
    assert "target" not in decoding[0]


def test_unfit_texts_are_found_without_reading_clips(make_dataset, corpus):
    rows = ["none/0.mp4,20,ab", "none/1.mp4,20,...", "none/2.mp4,8,abcdefgh", "none/3.mp4,9,abcde"]
    corpus.write_list("odd.csv", [f"set,{row}" for row in rows])
    dataset = make_dataset("odd.csv", text_transform=Letters())
    assert [(clip.index, clip.where[-6:]) for clip in dataset.unfit_texts(None)] == [(1, "line 2")]
    found = list(dataset.unfit_texts(lambda frames: frames // 2))
    assert [clip.index for clip in found] == [1, 2, 3]
    assert "the text has 8 tokens, expected at most 4" in str(found[1])


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


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(("video_start", "audio_start"), [(0, 0.16), (0, 1.0), (0.6, 0)])
def test_flash_and_click_stay_together(make_dataset, corpus, suffix, video_start, audio_start):
    path = corpus.root / "set" / f"a.{suffix}"
    at = video_start + 1.8
    write_flash_and_click(path, video_start=video_start, audio_start=audio_start, at=at)
    item = make_dataset(corpus.write_list("one.csv", [f"set,a.{suffix},75,bin"]))[0]
    flash = (item["video"].mean((1, 2, 3)) > 0).int().argmax().item() / 25
    click = (item["audio"] > 0.4).int().argmax().item() / 16000
    assert flash == pytest.approx(1.8)
    assert click == pytest.approx(flash, abs=0.01)
    assert item["audio"].shape == (640 * 75, 1)


@pytest.mark.parametrize("streams", [("video",), ("audio",), ("video", "audio")])
@pytest.mark.parametrize("number", [1, 15, 33, 120])
def test_clips_far_from_their_number(make_dataset, corpus, caplog, streams, number):
    file = corpus.write_list("one.csv", [f"set,clips/1.mp4,{number},bin"])
    message = rf"1.mp4: it has 24 frames at 25 a second, expected about {number}, .*one.csv, line 1"
    with pytest.raises(MediaError, match=message):
        make_dataset(file, streams=streams)[0]
    skipped = make_dataset(file, streams=streams, skip_bad_clips=True)[0]
    assert isinstance(skipped, BadClip)
    assert "it has 24 frames" in caplog.text


@pytest.mark.parametrize("streams", [("audio",), ("video", "audio")])
@pytest.mark.parametrize(("level", "offset"), [(0, 0), (1 / 32768, 0), (1 / 32768, 0.01)])
def test_silent_clips(make_dataset, corpus, streams, level, offset):
    samples = np.sign(make_speech(640 * 24)) * np.float32(level) + np.float32(offset)
    write_audio(corpus.root / "set" / "clips" / "1.wav", samples)
    with pytest.raises(MediaError, match="1.mp4: its sound is silent, expected speech"):
        make_dataset(streams=streams)[1]
    assert isinstance(make_dataset(streams=streams, skip_bad_clips=True)[1], BadClip)
    assert make_dataset(streams=("video",))[1] is not None
    write_audio(corpus.root / "set" / "clips" / "1.wav", make_speech(640 * 24) * 0.01)
    assert make_dataset(streams=streams)[1] is not None


@pytest.mark.parametrize("kept", [2, 4, 10, 20, 100])
def test_a_clip_that_was_cut_off(make_dataset, corpus, kept):
    whole = round(kept / 0.6)
    write_video(corpus.root / "set" / "a.mp4", make_picture(kept))
    write_audio(corpus.root / "set" / "a.wav", make_speech(640 * kept))
    file = corpus.write_list("one.csv", [f"set,a.mp4,{whole},bin", f"set,a.mp4,{kept},bin"])
    dataset = make_dataset(file)
    if whole > kept + 1:
        with pytest.raises(MediaError, match=f"it has {kept} frames at 25 a second"):
            dataset[0]
    assert len(dataset[1]["video"]) == kept


@pytest.mark.parametrize(("fps", "count"), [(24, 49), (30, 37), (50, 61), (60, 100), (10, 7)])
@pytest.mark.parametrize("rounded", [math.floor, round, math.ceil])
def test_numbers_of_other_frame_rates_may_be_rounded(make_dataset, corpus, fps, count, rounded):
    write_video(corpus.root / "set" / "a.mp4", make_picture(count), fps=fps)
    number = rounded(count / fps * 25)
    file = corpus.write_list("one.csv", [f"set,a.mp4,{number},bin"])
    assert abs(len(make_dataset(file, streams=("video",))[0]["video"]) - number) <= 1


@pytest.mark.parametrize(("video_start", "audio_start"), [(0, 0.16), (0, 1.0), (0.6, 0)])
def test_late_sound_alone_has_its_number(make_dataset, corpus, video_start, audio_start):
    path = corpus.root / "set" / "a.mkv"
    write_flash_and_click(path, video_start=video_start, audio_start=audio_start)
    file = corpus.write_list("one.csv", ["set,a.mkv,75,bin"])
    assert "audio" in make_dataset(file, streams=("audio",))[0]


def test_a_sound_track_that_ends_early(make_dataset, corpus):
    samples = np.full((1, 640 * 20), 0.1, np.float32)
    write_sound_track(corpus.root / "set" / "a.mp4", samples, frames=make_picture(40))
    dataset = make_dataset(corpus.write_list("one.csv", ["set,a.mp4,40,bin"]))
    with pytest.raises(MediaError, match=r"a.mp4: the video lasts 1.60 s and the audio 0.8"):
        dataset[0]


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
        clip = make_dataset(skip_bad_clips=True)[1]
    assert clip == BadClip(1, str(path), "no such file")
    assert caplog.messages == [f"skipped a bad clip: {path}: no such file"]
    assert make_dataset(streams=("audio",))[1] is not None


def test_frames_smaller_than_the_crop(make_dataset, corpus):
    path = corpus.root / "set" / "clips" / "0.mp4"
    write_video(path, make_picture(20, size=16))
    with pytest.raises(ValueError, match=r"0.mp4: got frames of 16x16 pixels"):
        make_dataset()[0]
    clip = make_dataset(skip_bad_clips=True)[0]
    assert (clip.where, clip.cause[:26]) == (str(path), "got frames of 16x16 pixels")


def test_frames_of_a_whole_face(make_dataset, corpus):
    write_video(corpus.root / "set" / "clips" / "0.mp4", make_picture(20, size=240))
    with pytest.raises(ValueError, match=r"0.mp4: got frames of 240x240 pixels, .* mouth crops"):
        make_dataset()[0]


def test_no_stream(make_dataset):
    with pytest.raises(ValueError, match="expected one or both"):
        make_dataset(streams=())
