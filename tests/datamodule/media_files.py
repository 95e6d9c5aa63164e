"""Makes small pictures, sounds and files of them."""

from fractions import Fraction

import av
import numpy as np


def make_picture(num_frames, seed=0, size=32):
    """Draw a smooth, moving, coloured picture with some noise: uint8 (T, H, W, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    t = np.arange(num_frames)[:, None, None]
    phase = rng.uniform(0, 6)
    channels = [
        np.sin(x / 9 + t / 5 + phase),
        np.cos(y / 7 - t / 6 + phase),
        np.sin((x + y) / 11 + t / 9),
    ]
    picture = 127 + 60 * np.stack(channels, axis=-1) + rng.normal(0, 3, (num_frames, size, size, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def make_speech(num_samples, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, num_samples).astype(np.float32)


def write_sound_track(path, samples, *, frames=None, rate=16000):
    """Write a file with a sound track (C, S) and, optionally, frames (T, H, W, 3)."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=rate)
        audio.codec_context.layout = "mono" if len(samples) == 1 else "stereo"
        if frames is not None:
            video = container.add_stream("libx264", rate=25)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = "yuv420p"
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples), format="fltp", layout=audio.codec_context.layout.name
        )
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def write_flash_and_click(
    path,
    *,
    video_start=0.0,
    audio_start=0.0,
    seconds=3.0,
    at=2.0,
    fps=25,
    gap=None,
    rate=16000,
    keyframes=250,
    b_frames=0,
):
    """Write a flash and a click at one time, in streams that need not start together.

    Times are in seconds on the time line of the container; nothing is written of the frames and
    samples within `gap`, a pair of times.
    """

    def in_gap(time):
        return gap is not None and gap[0] <= time < gap[1]

    millisecond = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        options = {"bf": str(b_frames), "g": str(keyframes), "sc_threshold": "0"}
        video = container.add_stream("libx264", rate=fps, options=options)
        video.height = video.width = 32
        video.pix_fmt = "yuv420p"
        video.codec_context.time_base = millisecond
        audio = container.add_stream("flac" if str(path).endswith("mkv") else "aac", rate=rate)
        audio.codec_context.layout = "mono"
        for index in range(round(seconds * fps)):
            time = video_start + index / fps
            if in_gap(time):
                continue
            level = 255 if at - 0.5 / fps < time <= at + 0.5 / fps else 0
            image = np.full((32, 32, 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(time * 1000), millisecond
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples = np.zeros((1, round(seconds * rate)), np.float32)
        click = round((at - audio_start) * rate)
        samples[:, click : click + rate // 50] = 0.9
        samples[:, ::50] += 0.01
        samples = np.ascontiguousarray(samples)
        format_name = audio.codec_context.format.name
        for begin in range(0, samples.shape[1], 1024):
            if in_gap(audio_start + begin / rate):
                continue
            block = samples[:, begin : begin + 1024]
            if format_name == "s16":
                block = (block * 32767).astype(np.int16)
            sound = av.AudioFrame.from_ndarray(block, format=format_name, layout="mono")
            sound.sample_rate, sound.time_base = rate, Fraction(1, rate)
            sound.pts = round(audio_start * rate) + begin
            container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
