"""Decodes video to grey frames and audio to mono samples, and writes both."""

from __future__ import annotations

import os
import struct
import unicodedata
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import ColorRange, VideoReformatter

from espnet.formats import AUDIO_RATE, VIDEO_RATE

if TYPE_CHECKING:
    import torch


# Formats whose first plane is 8-bit luma, and matrices whose luma is ITU-R 601's sum of red, green
# and blue (2: not stated, taken as 601). With both, the grey picture is the luma plane itself.
LUMA_FORMATS = {"yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "nv12", "gray"}
LUMA_601_COLORSPACES = {2, 5, 6}
LUMA_601_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
CANCELLED = 0.1  # of the channels' energy is left in their mean: one talks against the other

MAX_SLIP = 0.02  # seconds by which time stamps may miss the sum of the samples: half a frame
MAX_GAP = 60  # seconds that are filled; what jumps further is no gap, but a broken time stamp


class MediaError(ValueError):
    """A media file that cannot be used; the message is one line with the file and the cause."""

    def __init__(self, path: str | os.PathLike[str], cause: str) -> None:
        super().__init__(os.fspath(path), " ".join(cause.split()))

    def __str__(self) -> str:
        return ": ".join(self.args)


def wav_beside(video_path: str) -> str:
    """Name the .wav beside a video, whether there is one or not."""
    return os.path.splitext(video_path)[0] + ".wav"


def find_audio(video_path: str) -> str:
    """Name the file that holds a clip's audio: the .wav beside it, or else the video itself."""
    return find_file(wav_beside(video_path)) or find_file(video_path) or video_path


def find_file(path: str) -> str | None:
    """Find a file, though its suffix be in another case (.WAV) or its name in another Unicode form.

    Systems differ in whether they compose an accent with its letter (NFC) or not (NFD).

    Returns:
        The path as it is spelled on the disk, the given one if it is there; None if none is.
    """
    if os.path.exists(path):
        return path
    folder, name = os.path.split(path)
    if not name or folder and not (folder := find_file(folder) or ""):
        return None
    stem, suffix = os.path.splitext(name)
    stems = [stem, unicodedata.normalize("NFC", stem), unicodedata.normalize("NFD", stem)]
    suffixes = [suffix, suffix.lower(), suffix.upper(), suffix[:1] + suffix[1:].capitalize()]
    for name in dict.fromkeys(stem + suffix for stem in stems for suffix in suffixes):
        if os.path.exists(found := os.path.join(folder, name)):
            return found
    return None


def code_points(path: str | os.PathLike[str]) -> str:
    """Spell a path that is not ASCII by its code points, for messages; empty if it is ASCII."""
    path = os.fspath(path)
    return "" if path.isascii() else f" (spelled {ascii(path)})"


def read_video(path: str | os.PathLike[str]) -> torch.Tensor:
    """Decode the first video stream of a file to grey frames at 25 per second.

    Any container and codec that FFmpeg knows will do. At another rate than 25 fps each output frame
    is the source frame nearest in time; where frames are missing, the last one stays. Turned and
    mirrored as a player would show it.

    Returns:
        uint8 (T, H, W), 0 black to 255 white.

    Raises:
        MediaError: The file is missing or unreadable, has no video stream or no frame, is turned by
            something else than quarters, or its time stamps jump.
    """
    import torch

    frames, studio_range, times = [], [], []  # times: when each frame is shown, in seconds
    reformatter = VideoReformatter()
    with _first_stream(path, "video") as stream:
        rate = float(stream.average_rate or VIDEO_RATE)
        for frame in stream.container.decode(stream):
            picture, is_studio_range = _grey(frame, reformatter)
            frames.append(_upright(picture, frame, path))
            studio_range.append(is_studio_range)
            times.append(len(times) / rate if frame.time is None else frame.time)
    if not frames:
        raise MediaError(path, "the video stream holds no frame")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise MediaError(path, "the frame size changes within the video")
    _check_gap(path, np.diff(times).max(initial=0))
    chosen = _nearest_frames(np.array(times), last_duration=1 / rate)
    pictures = np.stack([frames[index] for index in chosen])  # (T, H, W)
    if all(studio_range):
        _stretch_range(pictures)
    else:
        for index in np.flatnonzero(np.array(studio_range)[chosen]):
            _stretch_range(pictures[index])
    return torch.from_numpy(pictures)


def read_audio(path: str | os.PathLike[str]) -> torch.Tensor:
    """Decode the first audio stream of a file to mono at 16 kHz; several channels are averaged.

    Of channels that would cancel each other, like stereo out of phase, the loudest is taken.
    In a file that holds video too, the first sample is at the time of the first frame: sound that
    starts later begins with silence, and what is before the video is left out. Gaps are silent.

    Returns:
        float32 (S,) in [-1, 1].

    Raises:
        MediaError: The file is missing or unreadable, has no audio stream or no sample, a sample is
            not finite, or the time stamps jump.
    """
    import torch

    samples = _read_plain_wav(path)
    start = 0
    if samples is None:
        samples = _decode_audio(path)
        if not np.isfinite(samples).all():
            raise MediaError(path, "the audio holds samples that are not finite")
        np.clip(samples, -1.0, 1.0, out=samples)
        start = audio_start(path)
    if len(samples) == 0:
        raise MediaError(path, "the audio stream holds no sample")
    if len(samples) <= -start:
        raise MediaError(path, "the sound ends before the video starts, expected both at a time")
    samples = np.pad(samples, (start, 0)) if start > 0 else samples[-start:]
    return torch.from_numpy(samples)


def audio_start(path: str | os.PathLike[str]) -> int:
    """Tell by how many samples the sound of a file starts after its video, by the time stamps.

    Returns:
        Samples at 16 kHz, negative for sound that starts first; 0 if they start within 0.02 s of
        each other, or if the file holds no moving picture.

    Raises:
        MediaError: The file is missing or unreadable, has no audio stream, or the streams start
            more than a minute apart.
    """
    times: dict[bool, float] = {}  # of the first frame, by whether it is one of video
    with _first_stream(path, "audio") as stream:
        videos = stream.container.streams.video
        if not videos or not videos[0].average_rate:  # A cover picture has no rate.
            return 0
        videos[0].codec_context.thread_count = 1
        for frame in stream.container.decode(videos[0], stream):
            times.setdefault(isinstance(frame, av.VideoFrame), frame.time or 0.0)
            if len(times) == 2:
                break
        else:
            return 0
    start = times[False] - times[True]
    _check_gap(path, abs(start))
    return round(start * AUDIO_RATE) if abs(start) > MAX_SLIP else 0


def write_video(
    path: str | os.PathLike[str], frames: np.ndarray, *, fps: int = VIDEO_RATE, crf: int = 20
) -> None:
    """Write frames as H.264 (yuv420p) in mp4, encoded on one thread.

    Args:
        path: The file to write.
        frames: uint8 (T, H, W, 3) red, green, blue or (T, H, W) grey; H and W even.
        fps: Frames per second.
        crf: Quality of x264, 0 lossless to 51 worst.

    Raises:
        MediaError: The frames have another type or shape, or the file cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[3:] not in ((), (3,)):
        got = f"{frames.dtype} {tuple(frames.shape)}"
        raise MediaError(path, f"got frames {got}, expected uint8 (T, H, W, 3) or (T, H, W)")
    if 0 in frames.shape or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise MediaError(path, f"got frames {tuple(frames.shape)}, expected T > 0 and even H, W")
    if frames.ndim == 3:
        frames = np.repeat(frames[..., None], 3, axis=3)  # (T, H, W) -> (T, H, W, 3)
    reformatter = VideoReformatter()
    try:
        with av.open(os.fspath(path), "w", format="mp4") as container:
            stream = container.add_stream(
                "libx264", rate=fps, options={"preset": "veryfast", "crf": str(crf)}
            )
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame = reformatter.reformat(frame, format="yuv420p", threads=1)
                frame.pts, frame.time_base = index, Fraction(1, fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(path, f"cannot write ({error})") from error


def write_audio(
    path: str | os.PathLike[str], samples: np.ndarray, *, rate: int = AUDIO_RATE
) -> None:
    """Write mono samples, float (S,), as 16-bit PCM wav; equal samples give equal bytes.

    What lies outside of [-1, 1] is clipped; the rate is in samples per second.

    Raises:
        MediaError: The samples have another shape or are not finite, or the file cannot be written.
    """
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise MediaError(path, f"got samples {tuple(samples.shape)}, expected finite values (S,)")
    pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
    try:
        with open(path, "wb") as raw, wave.open(raw, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(pcm.tobytes())
    except OSError as error:
        raise MediaError(path, f"cannot write ({error})") from error


@contextmanager
def _first_stream(path: str | os.PathLike[str], kind: str) -> Iterator[av.stream.Stream]:
    """Open the first video or audio stream of a file, to be decoded on one thread."""
    try:
        with av.open(os.fspath(path)) as container:
            streams = getattr(container.streams, kind)
            if not streams:
                raise MediaError(path, f"no {kind} stream")
            streams[0].codec_context.thread_count = 1
            yield streams[0]
    except (av.error.FFmpegError, OSError) as error:
        if not os.path.exists(path):
            cause = f"no such file{code_points(path)}"
        elif os.path.isfile(path) and os.path.getsize(path) == 0:
            cause = "the file is empty"
        else:
            cause = f"cannot be decoded ({getattr(error, 'strerror', None) or error})"
        raise MediaError(path, cause) from error


def _read_plain_wav(path: str | os.PathLike[str]) -> np.ndarray | None:
    """Read 16-bit mono wav at 16 kHz without FFmpeg, a hundred times faster; None if it is not."""
    try:
        with wave.open(os.fspath(path), "rb") as file:
            if file.getparams()[:3] != (1, 2, AUDIO_RATE):
                return None
            pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    except (OSError, EOFError, wave.Error, ValueError):
        return None  # another format, or a broken file: FFmpeg decides
    return np.multiply(pcm, np.float32(1 / 32768), dtype=np.float32)


def _decode_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode with FFmpeg to mono at 16 kHz, with silence in the gaps: float32 (S,)."""
    parts: list[np.ndarray] = []
    chunks: list[np.ndarray] = []  # of the part that is being decoded, (C, S) each
    resampler, kind, end = None, None, 0.0  # end: of what has been decoded, in seconds
    with _first_stream(path, "audio") as stream:
        for frame in stream.container.decode(stream):
            time = end if frame.time is None else frame.time
            gap = 0.0 if resampler is None else time - end
            is_new = kind != (kind := (frame.format.name, frame.layout.name, frame.sample_rate))
            if is_new or gap > MAX_SLIP:
                _check_gap(path, gap)
                parts += [_end_part(resampler, chunks), _silence(gap)]
                resampler, chunks = av.AudioResampler(format="fltp", rate=AUDIO_RATE), []
            # Time stamps that go back, as where files were joined, are taken to go on from there.
            begin = end if abs(time - end) <= MAX_SLIP else time
            end = begin + frame.samples / frame.sample_rate
            chunks.extend(part.to_ndarray() for part in resampler.resample(frame))
        parts.append(_end_part(resampler, chunks))
    return np.concatenate(parts)


def _end_part(resampler: av.AudioResampler | None, chunks: list[np.ndarray]) -> np.ndarray:
    """Take what a resampler still holds and make one channel of all: float32 (S,)."""
    if resampler is not None:
        chunks.extend(part.to_ndarray() for part in resampler.resample(None))
    if not chunks:
        return np.zeros(0, np.float32)
    channels = np.concatenate(chunks, axis=1)  # (C, S)
    mean = channels.mean(axis=0)
    energies = np.square(channels).sum(axis=1, dtype=np.float64)  # (C,)
    if np.square(mean).sum(dtype=np.float64) < CANCELLED * energies.mean():
        return channels[np.argmax(energies)]
    return mean


def _silence(seconds: float) -> np.ndarray:
    return np.zeros(round(max(seconds, 0.0) * AUDIO_RATE), np.float32)


def _check_gap(path: str | os.PathLike[str], seconds: float) -> None:
    if seconds > MAX_GAP:
        cause = f"its time stamps jump by {seconds:.0f} s, expected gaps of at most {MAX_GAP} s"
        raise MediaError(path, cause)


def _upright(picture: np.ndarray, frame: av.VideoFrame, path: str | os.PathLike[str]) -> np.ndarray:
    """Turn and mirror a picture (H, W) as the display matrix of its frame says.

    The matrix sends (x, y) to (a x + c y, b x + d y), with y downwards. `frame.rotation` tells
    nothing of mirrors.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > 0.01 * max(straight, crossed):
        raise MediaError(path, "the picture is turned askew, expected a multiple of 90 degrees")
    if crossed > straight:
        picture, a, d = picture.T, c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _grey(frame: av.VideoFrame, reformatter: VideoReformatter) -> tuple[np.ndarray, bool]:
    """Turn a decoded frame into grey levels with the weights of ITU-R 601.

    Returns:
        uint8 (H, W), and whether its levels are those of the studio range, 16 to 235.
    """
    name = frame.format.name
    if name in LUMA_FORMATS and int(frame.colorspace) in LUMA_601_COLORSPACES:
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        full_range = name == "gray" or "yuvj" in name or frame.color_range == ColorRange.JPEG
        # A copy lets go of the frame, whose memory the decoder then uses again.
        return rows[: frame.height, : frame.width].copy(), not full_range
    image = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
    return np.rint(image @ LUMA_601_WEIGHTS).astype(np.uint8), False


def _stretch_range(pictures: np.ndarray) -> None:
    """Stretch the levels 16 to 235 of uint8 pictures to 0 to 255, in place.

    Rounded down, which keeps the mean within a level of FFmpeg's RGB: it rounds down as well.
    """
    levels = np.clip(pictures, 16, 235).astype(np.uint16)
    levels -= 16
    levels *= 255
    levels //= 219
    pictures[:] = levels


def _nearest_frames(times: np.ndarray, *, last_duration: float) -> np.ndarray:
    """Choose the frame nearest to each tick of 1/25 s: indices (T,), at least one.

    Time stamps (T_in,) ascend; they and the time that the last frame is shown are in seconds. There
    are as many ticks as fit into the duration. No frame is shown much before its time, so after a
    gap the one before it stays until then.
    """
    times = times - times[0]
    spacings = np.diff(times)
    spacing = float(np.median(spacings)) if len(spacings) else last_duration
    if spacings.max(initial=0) > 1.5 * spacing:
        last_duration = min(last_duration, spacing)  # The rate is an average, which gaps lower.
    num_frames = max(1, round((times[-1] + last_duration) * VIDEO_RATE))
    ticks = np.arange(num_frames) / VIDEO_RATE
    earliest = times[1:] - 0.75 * spacing  # Evenly spaced frames begin at half a spacing before.
    return np.searchsorted(np.maximum((times[1:] + times[:-1]) / 2, earliest), ticks)
