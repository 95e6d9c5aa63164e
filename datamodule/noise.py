"""Sources of noise, and mixing of speech with noise at a given signal-to-noise ratio."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from datamodule.label_list import LabelList
from datamodule.media import MediaError, read_audio
from datamodule.sources import FileSource, Source

log = logging.getLogger(__name__)

SILENCE = 1e-10  # norm of a silent signal at most; far below one 24-bit step


class NoiseSource(Protocol):
    """What gives noise of any length."""

    def sample(
        self,
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
        exclude: str | None = None,
    ) -> torch.Tensor:
        """Draw noise, float32 (num_samples,), which does not come from the clip `exclude`."""
        ...


class FileNoise:
    """Stretches of noise files, which are read once; each file is drawn equally often.

    A folder stands for the WAV files in it and below.

    Raises:
        MediaError: A file cannot be read or is silent, or a folder holds none.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        paths = [file for path in paths for file in _recordings(path)]
        self._noises = [read_audio(path) for path in paths]
        for path, noise in zip(paths, self._noises, strict=True):
            if is_silent(noise):
                raise MediaError(path, "it is silent, expected noise; leave it out")

    def sample(
        self,
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
        exclude: str | None = None,  # noqa: ARG002 (noise files hold no utterance)
    ) -> torch.Tensor:
        """Draw a stretch, float32 (num_samples,), of a noise, begun anew where it ends.

        Where the noise is silent, its loudest place is taken instead.
        """
        noise = self._noises[draw_int(len(self._noises), generator)]
        stretch = _draw_stretch(noise, num_samples, generator)
        return _loudest_stretch(noise, num_samples) if is_silent(stretch) else stretch


class BabbleNoise:
    """Babble: several utterances of a list at once, each equally loud, never the one they disturb.

    They are drawn from a bank of a few utterances, which each process decodes when first needed.

    Args:
        labels: The list that the utterances come from.
        source: Where clips come from; None: media files.
        seed: Seed of the choice of the bank.
        bank_size: Number of utterances in the bank.
        num_voices: Number of utterances that speak at once.
        skip_bad_clips: Whether a clip that cannot be read is logged and left out.

    Attributes:
        only_clip: Path of the bank's clip if there is but one, for which it then has no noise.
    """

    def __init__(
        self,
        labels: LabelList,
        source: Source | None = None,
        *,
        seed: int,
        bank_size: int = 64,
        num_voices: int = 8,
        skip_bad_clips: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(labels), min(bank_size, len(labels)), replace=False)
        self._paths = [labels.path(index) for index in rows]
        self.only_clip = self._paths[0] if len(set(self._paths)) == 1 else None
        self._voices: dict[str, torch.Tensor] = {}
        self._num_voices = num_voices
        self._skip_bad_clips = skip_bad_clips
        self._source = source or FileSource()

    def sample(
        self,
        num_samples: int,
        *,
        generator: torch.Generator | None = None,
        exclude: str | None = None,
    ) -> torch.Tensor:
        """Draw babble, float32 (num_samples,), without the clip `exclude`.

        It is silent if the bank holds no other clip that sounds.

        Raises:
            MediaError: A clip of the bank cannot be read and is not to be skipped.
        """
        babble = torch.zeros(num_samples)
        order = torch.randperm(len(self._paths), generator=generator).tolist()
        others = [self._paths[index] for index in order if self._paths[index] != exclude]
        voices = [self._voice(path) for path in others[: self._num_voices]]
        voices = [voice for voice in voices if len(voice) > 0]
        for voice in voices:
            _add_stretch(babble, voice, generator)
        if voices and is_silent(babble):
            return _loudest_stretch(voices[0], num_samples)
        return babble

    def _voice(self, path: str) -> torch.Tensor:
        """Return a clip at unit loudness, float32 (S,), empty if it is silent or skipped."""
        if path not in self._voices:
            try:
                samples = self._source.audio(path)
            except MediaError as error:
                if not self._skip_bad_clips:
                    raise
                log.warning("left a bad clip out of the babble: %s", error)
                samples = torch.zeros(0)
            loudness = samples.square().mean().sqrt()
            self._voices[path] = samples / loudness if loudness > 0 else torch.zeros(0)
        return self._voices[path]


def add_noise(speech: torch.Tensor, noise: torch.Tensor, snr_db: float) -> torch.Tensor:
    """Mix so that the energies of speech and noise over the utterance have a ratio in dB.

    Speech, noise and result are float32 (S,); the result is the speech itself if speech or noise is
    silent.
    """
    speech_level = float(torch.linalg.vector_norm(speech, dtype=torch.float64))
    noise_level = float(torch.linalg.vector_norm(noise, dtype=torch.float64))
    if min(speech_level, noise_level) <= SILENCE:
        return speech
    gain = speech_level / noise_level * 10 ** (-snr_db / 20)
    return torch.add(speech, noise, alpha=gain)


def is_silent(samples: torch.Tensor) -> bool:
    """Tell whether a signal (S,) has no energy to speak of."""
    return float(torch.linalg.vector_norm(samples, dtype=torch.float64)) <= SILENCE


def _loudest_stretch(noise: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Cut `num_samples` out of a noise that hold its loudest sample."""
    start = min(int(noise.abs().argmax()), max(0, len(noise) - num_samples))
    return noise[start:].repeat(-(-num_samples // (len(noise) - start)))[:num_samples]


def _draw_stretch(
    noise: torch.Tensor, num_samples: int, generator: torch.Generator | None
) -> torch.Tensor:
    """Cut `num_samples` out of a noise at a random place; a shorter noise is repeated."""
    start = _draw_start(noise, num_samples, generator)
    if start + num_samples <= len(noise):
        return noise[start : start + num_samples]
    repeats = (start + num_samples) // len(noise) + 1
    return noise.repeat(repeats)[start : start + num_samples]


def _add_stretch(
    babble: torch.Tensor, voice: torch.Tensor, generator: torch.Generator | None
) -> None:
    """Add a stretch of a voice, as `_draw_stretch` cuts it, to babble (S,) in place."""
    begin, start = 0, _draw_start(voice, len(babble), generator)
    while begin < len(babble):
        part = voice[start : start + len(babble) - begin]
        babble[begin : begin + len(part)] += part
        begin, start = begin + len(part), 0


def _draw_start(noise: torch.Tensor, num_samples: int, generator: torch.Generator | None) -> int:
    """Draw where a stretch begins: where all of it fits in, if the noise is long enough."""
    spare = len(noise) - num_samples
    return draw_int(spare + 1 if spare >= 0 else len(noise), generator)


def _recordings(path: str) -> list[str]:
    """Name the WAV files of a folder, in order; a file stands for itself."""
    if not os.path.isdir(path):
        return [path]
    files = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if name.lower().endswith(".wav") and not name.startswith(".")
    )
    if not files:
        raise MediaError(path, "the folder holds no WAV file, expected noise recordings")
    return files


def draw_int(limit: int, generator: torch.Generator | None) -> int:
    """Draw a whole number from 0 to below a limit."""
    return int(torch.randint(limit, (), generator=generator))
