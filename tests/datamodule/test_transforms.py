"""Tests of datamodule/transforms.py."""

import numpy as np
import pytest
import torch
from media_files import make_picture, make_speech

from datamodule.transforms import AudioTransform, VideoTransform, draw_time_mask, needs_noise

BLACK = -0.421 / 0.165


class Ones:
    """Noise of constant level that records what it was asked for."""

    def __init__(self):
        self.asked = []

    def sample(self, num_samples, *, generator, exclude):
        self.asked.append(exclude)
        return torch.ones(num_samples) * torch.rand((), generator=generator)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def grey_clip(num_frames=30, size=32):
    return torch.from_numpy(make_picture(num_frames, size=size)[..., 0].copy())


@pytest.mark.parametrize("subset", ["val", "test"])
def test_video_evaluation_crops_the_centre(subset):
    frames = grey_clip()
    video = VideoTransform(subset=subset, crop_size=20)(frames)
    expected = (frames[:, 6:26, 6:26].float() / 255 - 0.421) / 0.165
    torch.testing.assert_close(video, expected.unsqueeze(1))
    assert video.dtype == torch.float32


def test_video_training_crops_and_masks():
    frames = grey_clip(60).clamp(min=1)
    transform = VideoTransform(subset="train", crop_size=20)
    crops, fractions = set(), []
    for seed in range(100):
        video = transform(frames, seeded(seed)).squeeze(1)
        masked = (video == torch.tensor(BLACK, dtype=torch.float32)).all(2).all(1)
        pixels = ((video * 0.165 + 0.421) * 255).round().to(torch.uint8)
        places = [
            (top, left)
            for top in range(13)
            for left in range(13)
            if torch.equal(pixels[~masked], frames[~masked, top : top + 20, left : left + 20])
        ]
        assert len(places) == 1  # one crop for the whole clip
        crops.add(places[0])
        fractions.append(masked.float().mean().item())
    assert {top for top, _ in crops} == {left for _, left in crops} == set(range(2, 11))
    assert np.mean(fractions) == pytest.approx(0.19, abs=0.04)


@pytest.mark.parametrize("rate", [25, 16000])
@pytest.mark.parametrize("seconds", [0.04, 0.5, 1, 2.6, 4])
def test_time_mask_is_one_stretch_of_at_most_two_fifths_of_each_second(rate, seconds):
    length = round(rate * seconds)
    longest = 0
    for seed in range(50):
        masked = draw_time_mask(length, rate=rate, generator=seeded(seed))
        assert masked.shape == (length,)
        assert masked.dtype == torch.bool
        for part in masked.split(rate):
            assert part.sum() <= 0.4 * len(part)
            assert torch.diff(part.int(), prepend=torch.zeros(1)).clamp(min=0).sum() <= 1
            longest = max(longest, part.float().mean().item())
    if seconds >= 0.5:
        assert longest > 0.3


def test_the_generator_alone_decides():
    frames, samples = grey_clip(), torch.from_numpy(make_speech(20000))
    video = VideoTransform(subset="train", crop_size=20)
    audio = AudioTransform(subset="train", noise=Ones())
    for transform, clip in ((video, frames), (audio, samples)):
        first = transform(clip, seeded(3))
        torch.manual_seed(1)
        assert torch.equal(transform(clip, seeded(3)), first)
        assert not torch.equal(transform(clip, seeded(4)), first)


def test_frame_smaller_than_the_crop():
    with pytest.raises(ValueError, match="got frames of 32x32 pixels.* 88x88"):
        VideoTransform(subset="val")(grey_clip())


@pytest.mark.parametrize("subset", ["train", "val", "test"])
@pytest.mark.parametrize("shape", [(720, 1280), (224, 224), (96, 200), (177, 96)])
def test_frames_of_a_whole_face(subset, shape):
    frames = torch.zeros(2, *shape, dtype=torch.uint8)
    message = rf"got frames of {shape[0]}x{shape[1]} pixels, expected mouth crops of about 96x96"
    with pytest.raises(ValueError, match=message):
        VideoTransform(subset=subset)(frames)


@pytest.mark.parametrize(
    ("size", "crop_size"), [(88, 88), (96, 88), (128, 88), (176, 88), (96, 24), (128, 112)]
)
def test_frames_of_a_mouth(size, crop_size):
    frames = torch.zeros(2, size, size, dtype=torch.uint8)
    video = VideoTransform(subset="val", crop_size=crop_size)(frames)
    assert video.shape == (2, 1, crop_size, crop_size)


@pytest.mark.parametrize("transform", [VideoTransform, AudioTransform])
def test_unknown_subset(transform):
    with pytest.raises(ValueError, match="got subset 'dev', expected one of train, val, test"):
        transform(subset="dev")


def test_audio_evaluation_normalises():
    samples = torch.from_numpy(make_speech(5000)) + 0.3
    audio = AudioTransform(subset="val")(samples)
    expected = (samples - samples.mean()) / samples.var(correction=0).sqrt()
    torch.testing.assert_close(audio, expected.unsqueeze(1))
    torch.testing.assert_close(
        AudioTransform(subset="val", normalize=False)(samples), samples.unsqueeze(1)
    )


@pytest.mark.parametrize("subset", ["train", "test"])
def test_silent_audio_stays_finite(subset):
    audio = AudioTransform(subset=subset, noise=Ones(), snr_target=0)(torch.zeros(3000), seeded(0))
    assert torch.equal(audio, torch.zeros(3000, 1))


@pytest.mark.parametrize("snr", [-5, 0, 10])
def test_audio_test_snr(snr):
    noise = Ones()
    samples = torch.from_numpy(make_speech(5000))
    transform = AudioTransform(subset="test", noise=noise, snr_target=snr, normalize=False)
    mixed = transform(samples, seeded(0), exclude="a.mp4").squeeze(1)
    ratio = samples.square().sum() / (mixed - samples).square().sum()
    assert 10 * torch.log10(ratio).item() == pytest.approx(snr, abs=1e-3)
    assert noise.asked == ["a.mp4"]


@pytest.mark.parametrize("subset", ["train", "test"])
def test_silent_noise_is_refused(subset):
    class Silence:
        def sample(self, num_samples, **_):
            return torch.zeros(num_samples)

    transform = AudioTransform(subset=subset, noise=Silence(), snr_target=-20)
    with pytest.raises(ValueError, match="a.mp4: got silent noise for an SNR of -20 dB, expected"):
        transform(torch.from_numpy(make_speech(5000)), seeded(0), exclude="a.mp4")


@pytest.mark.parametrize("snr", [None, 999999])
def test_audio_test_clean(snr):
    samples = torch.from_numpy(make_speech(5000))
    transform = AudioTransform(subset="test", noise=Ones(), snr_target=snr, normalize=False)
    assert torch.equal(transform(samples).squeeze(1), samples)
    assert not needs_noise(snr)


def test_audio_training_draws_snrs():
    samples = torch.from_numpy(make_speech(16000))
    before = samples.clone()
    transform = AudioTransform(subset="train", noise=Ones(), normalize=False)
    counts = {}
    for seed in range(300):
        audio = transform(samples, seeded(seed)).squeeze(1)
        # Constant noise is what is left of the mask; a clean utterance shows zeros there.
        noise = audio[audio == audio.mode().values]
        level = noise[0].item() if len(noise) > 1 else None
        if level is None:
            continue
        kept = samples[audio != level]
        energy = kept.square().sum().item()
        snr = 10 * np.log10(energy / (level**2 * 16000)) if level else None
        snr = None if snr is None else round(snr)
        counts[snr] = counts.get(snr, 0) + 1
    assert set(counts) == {-5, 0, 5, 10, 15, 20, None}
    assert torch.equal(samples, before)


def test_audio_training_without_noise_is_masked_only():
    samples = torch.from_numpy(make_speech(16000))
    audio = AudioTransform(subset="train", normalize=False)(samples, seeded(1)).squeeze(1)
    masked = audio == 0
    assert 0 < masked.sum() <= 6400
    assert torch.equal(audio[~masked], samples[~masked])


def test_noise_is_called_for_but_missing():
    with pytest.raises(ValueError, match="got an SNR of 0 dB without noise"):
        AudioTransform(subset="test", snr_target=0)


@pytest.mark.parametrize("rate", [25, 16000])
@pytest.mark.parametrize("length", [1, 24, 25, 61, 16001])
def test_masks_follow_the_draws(rate, length):
    for seed in range(20):
        masked = draw_time_mask(length, rate=rate, generator=seeded(seed))
        expected = torch.zeros(length, dtype=torch.bool)
        sizes, places = torch.rand(2, -(-length // rate), generator=seeded(seed))
        for begin, size, place in zip(range(0, length, rate), sizes, places, strict=True):
            span = min(rate, length - begin)
            size = int(size * (span * 2 // 5 + 1))
            start = begin + int(place * (span - size + 1))
            expected[start : start + size] = True
        assert torch.equal(masked, expected)
