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
