"""Tests of datamodule/noise.py."""

import logging
import math

import pytest
import torch
from media_files import make_speech

from datamodule import noise as noise_module
from datamodule.label_list import LabelList
from datamodule.media import MediaError, find_audio, read_audio, write_audio
from datamodule.noise import BabbleNoise, FileNoise, add_noise


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("snr", [-20, -5, 0, 20])
def test_add_noise_is_exact(snr):
    speech, noise = torch.randn(2, 5000, generator=seeded(0)) * torch.tensor([[0.1], [30.0]])
    added = add_noise(speech, noise, snr) - speech
    ratio = (speech.double().square().sum() / added.double().square().sum()).item()
    assert 10 * math.log10(ratio) == pytest.approx(snr, abs=1e-3)
    torch.testing.assert_close(added / added.norm(), noise / noise.norm(), atol=1e-5, rtol=0)


def test_silence_is_left_alone():
    speech, silence = torch.randn(100, generator=seeded(0)), torch.zeros(100)
    assert torch.equal(add_noise(speech, silence, 0), speech)
    assert torch.equal(add_noise(silence, speech, 0), silence)


@pytest.mark.parametrize("level", [1e-42, 1e-30, 1e-9])
def test_quiet_noise_stays_finite(level):
    speech = torch.randn(100, generator=seeded(0))
    assert add_noise(speech, torch.full((100,), level), -5).isfinite().all()


def test_file_noise_cuts_and_wraps(tmp_path):
    samples = torch.arange(1000) / 32768
    write_audio(tmp_path / "a.wav", samples.numpy())
    noise = FileNoise([str(tmp_path / "a.wav")])
    starts = set()
    for seed in range(50):
        for length in (1, 400, 1000, 3456):
            stretch = noise.sample(length, generator=seeded(seed))
            start = round(stretch[0].item() * 32768)
            expected = (start + torch.arange(length)) % 1000 / 32768
            torch.testing.assert_close(stretch, expected)
            starts.add(start)
    assert len(starts) > 50


def test_file_noise_draws_all_files(tmp_path):
    for level in (1, 2, 3):
        write_audio(tmp_path / f"{level}.wav", torch.full((10,), level / 8).numpy())
    noise = FileNoise([str(tmp_path / f"{level}.wav") for level in (1, 2, 3)])
    levels = {noise.sample(5, generator=seeded(seed))[0].item() for seed in range(30)}
    assert levels == {1 / 8, 2 / 8, 3 / 8}


def test_a_folder_of_noise(tmp_path):
    (tmp_path / "below").mkdir()
    for level, name in enumerate(["a.wav", "B.WAV", "below/c.wav"], 1):
        write_audio(tmp_path / name, torch.full((10,), level / 8).numpy())
    (tmp_path / "README.txt").write_text("not a recording")
    (tmp_path / "._a.wav").write_text("what some systems leave beside a file")
    noise = FileNoise([str(tmp_path)])
    levels = {noise.sample(5, generator=seeded(seed))[0].item() for seed in range(30)}
    assert levels == {1 / 8, 2 / 8, 3 / 8}
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="empty: the folder holds no WAV file, expected noise"):
        FileNoise([str(tmp_path / "empty")])


def test_missing_noise_file(tmp_path):
    with pytest.raises(MediaError, match="none.wav: no such file"):
        FileNoise([str(tmp_path / "none.wav")])


def test_babble_never_holds_the_utterance(corpus):
    labels = LabelList(str(corpus.root), "ids.csv")
    noise = BabbleNoise(labels, seed=0, num_voices=8)
    voices = [read_audio(find_audio(labels.path(index))) for index in range(5)]
    voices = [voice / voice.square().mean().sqrt() for voice in voices]
    shortest = min(len(voice) for voice in voices)
    for index in range(5):
        babble = noise.sample(shortest, generator=seeded(index), exclude=labels.path(index))
        for other, voice in enumerate(voices):
            # White noise correlates with itself at one shift and nowhere else.
            size = len(voice) + shortest
            spectrum = torch.fft.rfft(voice, size).conj() * torch.fft.rfft(babble, size)
            peak = torch.fft.irfft(spectrum, size).max() / shortest
            assert (peak > 0.4) == (other != index)


def test_babble_draws_some_of_the_bank(corpus):
    noise = BabbleNoise(LabelList(str(corpus.root), "ids.csv"), seed=0, bank_size=3, num_voices=1)
    draws = [noise.sample(100000, generator=seeded(seed)) for seed in range(20)]
    assert all(draw.square().mean().item() == pytest.approx(1, rel=0.05) for draw in draws)
    periods = {
        length
        for draw in draws
        for length in corpus.num_frames
        if torch.equal(draw[: -640 * length - 100], draw[640 * length + 100 :])
    }
    assert len(periods) == 3
    again = BabbleNoise(LabelList(str(corpus.root), "ids.csv"), seed=0, bank_size=3, num_voices=1)
    assert torch.equal(again.sample(100000, generator=seeded(0)), draws[0])


def test_a_silent_noise_file_is_refused(tmp_path):
    write_audio(tmp_path / "a.wav", make_speech(100))
    write_audio(tmp_path / "b.wav", make_speech(100) * 0)
    with pytest.raises(MediaError, match=r"b.wav: it is silent, expected noise"):
        FileNoise([str(tmp_path / "a.wav"), str(tmp_path / "b.wav")])


@pytest.mark.parametrize("begin", [0, 30000, 49000])
@pytest.mark.parametrize("num_samples", [500, 1500, 70000])
def test_a_silent_stretch_is_not_drawn(tmp_path, begin, num_samples):
    samples = torch.zeros(50000)
    samples[begin : begin + 1000] = torch.from_numpy(make_speech(1000))
    write_audio(tmp_path / "a.wav", samples.numpy())
    noise = FileNoise([str(tmp_path / "a.wav")])
    for seed in range(20):
        stretch = noise.sample(num_samples, generator=seeded(seed))
        assert stretch.shape == (num_samples,)
        assert stretch.abs().max() > 0.1


def test_babble_of_mostly_silent_clips(corpus):
    for index in range(5):
        samples = make_speech(30000) * 0
        samples[7000:7010] = 0.5
        write_audio(corpus.root / "set" / "clips" / f"{index}.wav", samples)
    noise = BabbleNoise(LabelList(str(corpus.root), "ids.csv"), seed=0)
    for seed in range(20):
        babble = noise.sample(300, generator=seeded(seed))
        assert babble.shape == (300,)
        assert babble.norm() > 0


def test_babble_without_others_is_silent(corpus):
    row = (corpus.root / "labels" / "ids.csv").read_text().splitlines()[0]
    labels = LabelList(str(corpus.root), corpus.write_list("one.csv", [row]))
    babble = BabbleNoise(labels, seed=0).sample(50, exclude=labels.path(0))
    assert torch.equal(babble, torch.zeros(50))


def test_babble_of_bad_clips(corpus, caplog):
    labels = LabelList(str(corpus.root), "ids.csv")
    (corpus.root / "set" / "clips" / "3.wav").write_bytes(b"")
    write_audio(corpus.root / "set" / "clips" / "4.wav", make_speech(2000) * 0)
    with pytest.raises(MediaError, match=r"3.wav: the file is empty"):
        BabbleNoise(labels, seed=0).sample(100)
    noise = BabbleNoise(labels, seed=0, skip_bad_clips=True)
    with caplog.at_level(logging.WARNING):
        babble = noise.sample(10000)
        noise.sample(100)
    assert babble.square().mean().item() == pytest.approx(3, rel=0.1)
    assert [record.getMessage() for record in caplog.records] == [
        f"left a bad clip out of the babble: {corpus.root}/set/clips/3.wav: the file is empty"
    ]


@pytest.mark.parametrize("num_voice", [1, 7, 100, 101, 1000])
def test_stretches_are_added_as_they_are_drawn(num_voice):
    voice, babble = torch.randn(num_voice, generator=seeded(0)), torch.randn(100)
    for seed in range(20):
        stretch = noise_module._draw_stretch(voice, 100, seeded(seed))
        assert stretch.shape == (100,)
        mixed = babble.clone()
        noise_module._add_stretch(mixed, voice, seeded(seed))
        assert torch.equal(mixed, babble + stretch)
