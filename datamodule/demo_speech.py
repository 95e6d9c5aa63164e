"""Speaks text with espeak-ng and says when each phoneme sounds; the library comes from a package.

espeak-ng is called through ctypes, in the shared library that the package `espeakng-loader`
installs. Nothing of it is part of this project.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass

import av
import numpy as np

from espnet.formats import AUDIO_RATE

LOADER_PACKAGE = "espeakng_loader"
MISSING_LOADER = (
    "the demo corpus needs the package espeakng-loader, which is not installed: "
    "pip install -r requirements-demo.txt"
)

# Names and values of espeak-ng's C interface.
OUTPUT_SYNCHRONOUS = 2
PHONEME_EVENTS, DO_NOT_EXIT = 0x0001, 0x8000
UTF8_TEXT, PHONEME_INPUT = 0x0001, 0x0100
EVENT_LIST_END, EVENT_PHONEME = 0, 7
PARAMETER_RATE, PARAMETER_PITCH, PARAMETER_RANGE = 1, 3, 4
PAUSE_MARK = "_"  # the phonemes "_", "_:" and their like are silence
STRESS_MARKS = "',%=|"

SPEECH_LEVEL = 0.06  # root mean square of the spoken part, full scale 1
PEAK_LEVEL = 0.95


class _Event(ctypes.Structure):
    """One entry of the event list that espeak-ng hands to the callback."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),  # a union in C: the phoneme's mnemonic, or a number
    ]


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class Voice:
    """How a speaker sounds, in espeak-ng's terms."""

    accent: str  # language name, such as "en-us"
    variant: str  # file of a voice variant, such as "f2"
    pitch: int  # 0 to 100, 50 being the variant's own
    pitch_range: int  # 0 (monotone) to 100
    rate: int  # words per minute


@dataclass(frozen=True)
class Phoneme:
    """A phoneme's mnemonic without stress marks, and its time in seconds."""

    name: str
    start: float
    end: float


def require_espeak() -> None:
    """Check that espeak-ng can be loaded.

    Raises:
        ValueError: The package espeakng-loader is not installed.
    """
    if importlib.util.find_spec(LOADER_PACKAGE) is None:
        raise ValueError(MISSING_LOADER)


class Synthesizer:
    """The one espeak-ng of this process.

    The samples depend on what the process has spoken before, so a speaker is reproducible only when
    a fresh process speaks the same texts in the same order.

    Args:
        seed: Seed of espeak-ng's own noise, which otherwise depends on the time of day.

    Raises:
        ValueError: The package espeakng-loader is not installed.
        RuntimeError: espeak-ng does not start.
    """

    def __init__(self, seed: int) -> None:
        require_espeak()
        import espeakng_loader

        self._data_path = espeakng_loader.get_data_path()
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self.sample_rate = self._library.espeak_Initialize(
            OUTPUT_SYNCHRONOUS, 0, os.fsencode(self._data_path), PHONEME_EVENTS | DO_NOT_EXIT
        )
        if self.sample_rate <= 0:
            raise RuntimeError(f"espeak-ng does not start with its data in {self._data_path}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))  # starting set another one
        self._chunks: list[np.ndarray] = []
        self._marks: list[tuple[float, str]] = []
        self._callback = _Callback(self._collect)  # kept alive here: C holds only a pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def set_voice(self, voice: Voice) -> None:
        """Choose accent and variant, pitch, range and rate from now on.

        Raises:
            ValueError: espeak-ng has no such accent or variant.
        """
        variant_file = os.path.join(self._data_path, "voices", "!v", voice.variant)
        name = f"{voice.accent}+{voice.variant}"
        # espeak-ng ignores a variant that it does not find, so the file is looked for here.
        if not os.path.isfile(variant_file) or self._library.espeak_SetVoiceByName(name.encode()):
            raise ValueError(f"espeak-ng has no voice {name}: choose another accent or variant")
        self._library.espeak_SetParameter(PARAMETER_RATE, voice.rate, 0)
        self._library.espeak_SetParameter(PARAMETER_PITCH, voice.pitch, 0)
        self._library.espeak_SetParameter(PARAMETER_RANGE, voice.pitch_range, 0)

    def speak(self, text: str) -> tuple[np.ndarray, list[Phoneme]]:
        """Speak a text, at a level that does not depend on the voice.

        Args:
            text: Words; `[[...]]` holds phonemes in espeak-ng's notation.

        Returns:
            Samples at 16 kHz, float32 (S,) in [-1, 1], and the phonemes in order, pauses left out.

        Raises:
            RuntimeError: espeak-ng gives no sound for the text.
        """
        self._chunks.clear()
        self._marks.clear()
        encoded = text.encode() + b"\0"
        self._library.espeak_Synth(
            encoded, len(encoded), 0, 1, 0, UTF8_TEXT | PHONEME_INPUT, None, None
        )
        if not self._chunks or not self._marks:
            raise RuntimeError(f"espeak-ng gives no sound for {text!r}")
        pcm = np.concatenate(self._chunks)
        ends = [start for start, _ in self._marks[1:]] + [len(pcm) / self.sample_rate]
        phonemes = [
            Phoneme(name.strip(STRESS_MARKS), start, end)
            for (start, name), end in zip(self._marks, ends, strict=True)
            if not name.startswith(PAUSE_MARK)
        ]
        return _level(_resample(pcm, self.sample_rate), phonemes), phonemes

    def _collect(
        self, samples: ctypes.POINTER(ctypes.c_short), count: int, events: ctypes.POINTER(_Event)
    ) -> int:
        """Take a piece of sound and its events from espeak-ng; 0 asks for more."""
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != EVENT_LIST_END:
            event = events[index]
            if event.type == EVENT_PHONEME:
                name = event.name.decode("utf-8", "replace")
                self._marks.append((event.audio_position / 1000, name))
            index += 1
        return 0


def _resample(pcm: np.ndarray, rate: int) -> np.ndarray:
    """Bring 16-bit samples to 16 kHz: int16 (S_in,) -> float32 (S,)."""
    frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=AUDIO_RATE)
    parts = resampler.resample(frame) + resampler.resample(None)
    return np.concatenate([part.to_ndarray()[0] for part in parts])


def _level(samples: np.ndarray, phonemes: list[Phoneme]) -> np.ndarray:
    """Scale samples so that their spoken part has the common level, without clipping."""
    first, last = (round(t * AUDIO_RATE) for t in (phonemes[0].start, phonemes[-1].end))
    loudness = float(np.sqrt(np.mean(np.square(samples[first:last], dtype=np.float64))))
    peak = float(np.abs(samples).max())
    return samples * np.float32(min(SPEECH_LEVEL / loudness, PEAK_LEVEL / peak))
