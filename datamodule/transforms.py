"""Turns decoded video and audio into what the streams take, with augmentation in training."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from datamodule.noise import NoiseSource, add_noise, draw_int, is_silent
from espnet.formats import AUDIO_RATE, CLEAN_SNR, VIDEO_MEAN, VIDEO_RATE, VIDEO_STD

MAX_SHIFT = 4  # pixels; a small crop that were drawn anywhere would often miss the mouth
MOUTH_SIZE = 96  # pixels of a side, of which 88 are taken
LARGEST_MOUTH = 128  # pixels that a mouth crop may have whatever is taken of it
MASK_SECONDS = 0.4  # longest time mask in each second
TRAINING_SNRS = (-5, 0, 5, 10, 15, 20, None)  # dB; None: clean
LAYER_NORM_EPS = 1e-8

SUBSETS = ("train", "val", "test")


class VideoTransform:
    """Crops to squares of `crop_size` pixels, masks (in training) and normalises a clip.

    In training the crop is drawn once for the clip, up to 4 pixels from the centre (all that 88 of
    96 leave), and up to 0.4 s in every second are masked; otherwise the crop is the centre.

    Raises:
        ValueError: The subset is not "train", "val" or "test".
    """

    def __init__(self, *, subset: str, crop_size: int = 88) -> None:
        self.training = _is_training(subset)
        self.crop_size = crop_size

    def __call__(
        self, frames: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Transform one clip, uint8 (T, H, W); what is random is drawn with the generator.

        Returns:
            float32 (T, 1, crop, crop).

        Raises:
            ValueError: The frames are smaller than the crop, or so much larger that they must show
                more than a mouth.
        """
        height, width = frames.shape[1:]
        size = self.crop_size
        if height < size or width < size:
            raise ValueError(
                f"got frames of {height}x{width} pixels, expected at least the crop size of "
                f"{size}x{size}; choose a smaller --crop-size"
            )
        if max(height, width) > max(2 * size, LARGEST_MOUTH):
            mouth = round(size * MOUTH_SIZE / 88)
            raise ValueError(
                f"got frames of {height}x{width} pixels, expected mouth crops of about "
                f"{mouth}x{mouth} for a crop size of {size}; crop the video to the mouth first, "
                "which no command here does yet"
            )
        top, left = (height - size) // 2, (width - size) // 2
        if self.training:
            top = _shift(top, height - size, generator)
            left = _shift(left, width - size, generator)
        crop = frames[:, top : top + size, left : left + size]
        video = crop.float().mul_(1 / (255 * VIDEO_STD)).sub_(VIDEO_MEAN / VIDEO_STD)
        if self.training:
            masked = draw_time_mask(len(frames), rate=VIDEO_RATE, generator=generator)
            video.numpy()[masked.numpy()] = -VIDEO_MEAN / VIDEO_STD  # black; torch is slower
        return video.unsqueeze(1)  # (T, H, W) -> (T, 1, H, W)


def _shift(centre: int, largest: int, generator: torch.Generator | None) -> int:
    """Draw where the crop begins, up to MAX_SHIFT from the centre and within 0 and largest."""
    lowest, highest = max(0, centre - MAX_SHIFT), min(largest, centre + MAX_SHIFT)
    return lowest + draw_int(highest - lowest + 1, generator)


class AudioTransform:
    """Masks (in training), mixes with noise and normalises an utterance.

    Args:
        subset: "train", "val" or "test".
        noise: Where noise comes from; None leaves the speech clean.
        snr_target: Signal-to-noise ratio in dB, 999999 or more for clean. None: drawn from -5, 0,
            5, 10, 15, 20 dB and clean in training, clean otherwise.
        normalize: Whether to layer-normalise over the utterance.

    Raises:
        ValueError: The subset is unknown.
        ValueError: `snr_target` calls for noise and there is no `noise`.
    """

    def __init__(
        self,
        *,
        subset: str,
        noise: NoiseSource | None = None,
        snr_target: float | None = None,
        normalize: bool = True,
    ) -> None:
        self.training = _is_training(subset)
        self.noise = noise
        self.normalize = normalize
        if snr_target is not None:
            self.snrs = (snr_target if needs_noise(snr_target) else None,)
        else:
            self.snrs = TRAINING_SNRS if self.training and noise is not None else (None,)
        if noise is None and self.snrs != (None,):
            raise ValueError(f"got an SNR of {snr_target} dB without noise, expected a noise file")

    def __call__(
        self,
        samples: torch.Tensor,
        generator: torch.Generator | None = None,
        *,
        exclude: str | None = None,
    ) -> torch.Tensor:
        """Transform one utterance.

        Args:
            samples: float32 (S,) in [-1, 1]; left as they are.
            generator: Source of the random masks and noise; None is torch's global one.
            exclude: Path of the utterance, which babble must not contain.

        Returns:
            float32 (S, 1).

        Raises:
            ValueError: The noise is silent, so that no such SNR could be had.
        """
        if self.training:
            masked = draw_time_mask(len(samples), rate=AUDIO_RATE, generator=generator)
            samples = samples.masked_fill(masked, 0.0)
        snr = self.snrs[draw_int(len(self.snrs), generator)]
        if snr is not None:
            noise = self.noise.sample(len(samples), generator=generator, exclude=exclude)
            if is_silent(noise):
                of_clip = f"{exclude}: " if exclude else ""
                raise ValueError(
                    f"{of_clip}got silent noise for an SNR of {snr} dB, expected other clips that "
                    "sound to make babble of; give noise recordings (--noise-file)"
                )
            samples = add_noise(samples, noise, snr)
        if self.normalize:
            samples = F.layer_norm(samples, samples.shape, eps=LAYER_NORM_EPS)
        return samples.unsqueeze(1)  # (S,) -> (S, 1)


def needs_noise(snr_target: float | None) -> bool:
    """Whether a test SNR in dB means that noise is added: it is neither None nor "clean"."""
    return snr_target is not None and snr_target < CLEAN_SNR


def draw_time_mask(
    length: int, *, rate: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw one mask for each second: up to 0.4 s (or two fifths of a last, shorter second).

    `length` counts frames or samples, at least 1, and `rate` is theirs per second.

    Returns:
        bool (length,), True where masked.
    """
    num_seconds = -(-length // rate)
    spans = np.full(num_seconds, rate, np.float32)
    spans[-1] = length - rate * (num_seconds - 1)
    longest = np.floor(spans * np.float32(MASK_SECONDS))
    draws = torch.rand(2, num_seconds, generator=generator).numpy()
    sizes = np.floor(draws[0] * (longest + 1))
    starts = np.floor(draws[1] * (spans - sizes + 1))
    places = np.arange(rate, dtype=np.float32)  # NumPy takes a third of torch's time for all this.
    masked = (places >= starts[:, None]) & (places < (starts + sizes)[:, None])  # (seconds, rate)
    return torch.from_numpy(masked.ravel()[:length])


def _is_training(subset: str) -> bool:
    if subset not in SUBSETS:
        raise ValueError(f"got subset {subset!r}, expected one of {', '.join(SUBSETS)}")
    return subset == "train"
