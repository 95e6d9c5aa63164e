"""Tests of datamodule/media.py."""

import struct
import subprocess
import sys
import unicodedata
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from media_files import make_picture, make_speech, write_flash_and_click, write_sound_track

from datamodule import media
from datamodule.media import (
    MediaError,
    find_audio,
    find_file,
    read_audio,
    read_video,
    write_audio,
    write_video,
)

GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])


def decode_rgb(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def encode(path, frames, *, times, colorspace=None, color_range=None, pix_fmt="yuv420p"):
    """Write frames (T, H, W, 3) with the given time stamps in milliseconds."""
    reformatter = VideoReformatter()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0", "crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if colorspace:
            stream.codec_context.colorspace = int(colorspace)
        if color_range:
            stream.codec_context.color_range = int(color_range)
        for image, time in zip(frames, times, strict=True):
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"),
                format=pix_fmt,
                dst_colorspace=colorspace,
                dst_color_range=color_range,
            )
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("grey", [False, True])
def test_read_video_agrees_with_rgb(tmp_path, grey):
    frames = make_picture(10, size=48)
    write_video(tmp_path / "a.mp4", frames[..., 0] if grey else frames)
    video = read_video(tmp_path / "a.mp4")
    assert video.dtype == torch.uint8
    assert video.shape == (10, 48, 48)
    expected = decode_rgb(tmp_path / "a.mp4") @ GREY_WEIGHTS
    assert np.abs(video.numpy() - expected).mean() < 1


@pytest.mark.parametrize(
    ("colorspace", "color_range", "pix_fmt"),
    [
        (Colorspace.ITU601, ColorRange.JPEG, "yuv420p"),
        (Colorspace.ITU709, ColorRange.MPEG, "yuv420p"),
        (Colorspace.ITU601, ColorRange.MPEG, "yuv420p10le"),
    ],
)
def test_read_video_agrees_with_rgb_for_other_encodings(tmp_path, colorspace, color_range, pix_fmt):
    encode(
        tmp_path / "a.mp4",
        make_picture(5, size=48),
        times=range(0, 200, 40),
        colorspace=colorspace,
        color_range=color_range,
        pix_fmt=pix_fmt,
    )
    expected = decode_rgb(tmp_path / "a.mp4") @ GREY_WEIGHTS
    assert np.abs(read_video(tmp_path / "a.mp4").numpy() - expected).mean() < 1


def test_grey_levels_use_the_full_range(tmp_path):
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (2, 64, 1))
    write_video(tmp_path / "a.mp4", ramp, crf=1)
    np.testing.assert_allclose(read_video(tmp_path / "a.mp4").numpy(), ramp, atol=3)


@pytest.mark.parametrize(
    ("fps", "num_frames", "expected"),
    [
        (50, 20, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (30, 12, [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]),
        (10, 4, [0, 0, 1, 1, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_read_video_resamples_to_25_fps(tmp_path, fps, num_frames, expected):
    levels = np.arange(num_frames, dtype=np.uint8) * 10 + 20
    frames = np.broadcast_to(levels[:, None, None], (num_frames, 32, 32))
    write_video(tmp_path / "a.mp4", np.ascontiguousarray(frames), fps=fps)
    found = np.rint((read_video(tmp_path / "a.mp4").float().mean((1, 2)).numpy() - 20) / 10)
    assert len(found) == len(expected)
    # Where two source frames are equally near, either is right.
    times = np.arange(len(expected)) / 25
    assert (np.abs(found / fps - times) <= 0.5 / fps + 1e-6).all() or found.tolist() == expected


def test_read_video_follows_time_stamps(tmp_path):
    levels = [20, 90, 160, 230]
    frames = np.stack([np.full((32, 32, 3), level, np.uint8) for level in levels])
    encode(tmp_path / "a.mkv", frames, times=[0, 40, 160, 200])
    video = read_video(tmp_path / "a.mkv").float().mean((1, 2))
    expected = torch.tensor([20.0, 90, 90, 160, 160, 230])
    assert len(video) == 6
    near = (video[[0, 1, 4, 5]] - expected[[0, 1, 4, 5]]).abs()
    assert (near < 4).all()


@pytest.mark.parametrize("num_samples", [1, 16000])
def test_audio_round_trip(tmp_path, num_samples):
    samples = make_speech(num_samples)
    write_audio(tmp_path / "a.wav", samples)
    audio = read_audio(tmp_path / "a.wav")
    assert audio.dtype == torch.float32
    np.testing.assert_allclose(audio.numpy(), samples, atol=0.5 / 32768 + 1e-7)


def test_write_audio_is_deterministic_and_clips(tmp_path):
    samples = np.array([0.0, 2.0, -2.0, 0.5], np.float32)
    for name in ("a.wav", "b.wav"):
        write_audio(tmp_path / name, samples)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    expected = torch.tensor([0.0, 32767 / 32768, -1.0, 0.5])
    torch.testing.assert_close(read_audio(tmp_path / "a.wav"), expected)


def test_read_audio_resamples(tmp_path):
    def tone(rate):
        return np.sin(np.arange(rate) / rate * 2 * np.pi * 440).astype(np.float32) * 0.5

    write_audio(tmp_path / "a.wav", tone(44100), rate=44100)
    audio = read_audio(tmp_path / "a.wav")
    assert abs(len(audio) - 16000) <= 2
    # Equal but for the edges and the low-pass filter's ripple.
    np.testing.assert_allclose(audio[200:15800], tone(16000)[200:15800], atol=5e-3)


def test_read_audio_averages_channels(tmp_path):
    channels = np.stack([np.full(1600, 8192), np.full(1600, -4096)], axis=1).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(channels.tobytes())
    torch.testing.assert_close(read_audio(tmp_path / "a.wav"), torch.full((1600,), 0.0625))


@pytest.mark.parametrize("factor", [-1.0, -0.9, -1.1])
def test_channels_out_of_phase_do_not_cancel(tmp_path, factor):
    channels = np.stack([make_speech(32000), factor * make_speech(32000)])
    write_pcm(tmp_path / "a.wav", channels)
    expected = channels[int(factor < -1)]
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav").numpy(), expected, atol=2e-5)
    write_sound_track(tmp_path / "a.mp4", channels)
    level = read_audio(tmp_path / "a.mp4")[2000:30000].square().mean().sqrt()
    assert level == pytest.approx(0.1 * max(1, -factor), rel=0.15)


@pytest.mark.parametrize("num_channels", [2, 6])
def test_one_channel_of_several_that_sounds_is_averaged(tmp_path, num_channels):
    channels = np.zeros((num_channels, 16000), np.float32)
    channels[0] = make_speech(16000)
    write_pcm(tmp_path / "a.wav", channels)
    expected = channels[0] / num_channels
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav").numpy(), expected, atol=2e-5)


def write_pcm(path, channels):
    """Write channels (C, S) as 16-bit wav at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(16000)
        pcm = np.clip(np.rint(channels.T * 32768), -32768, 32767)
        file.writeframes(pcm.astype("<i2").tobytes())


def test_read_audio_of_a_sound_track(tmp_path):
    tone = np.sin(np.arange(48000) / 48000 * 2 * np.pi * 300)[None].astype(np.float32) * 0.5
    write_sound_track(tmp_path / "a.mp4", tone, frames=make_picture(25), rate=48000)
    audio = read_audio(tmp_path / "a.mp4")
    assert abs(len(audio) - 16000) < 0.1 * 16000
    level = audio[4000:12000].square().mean().sqrt()
    assert level == pytest.approx(0.5 / 2**0.5, rel=0.05)
    assert len(read_video(tmp_path / "a.mp4")) == 25


def test_find_audio_prefers_wav(tmp_path):
    video = str(tmp_path / "a.mp4")
    assert find_audio(video) == video
    write_audio(tmp_path / "a.wav", make_speech(10))
    assert find_audio(video) == str(tmp_path / "a.wav")


@pytest.mark.parametrize(("listed", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("suffix", [".wav", ".WAV", ".Wav"])
def test_files_are_found_in_other_spellings(tmp_path, listed, there, suffix):
    folder, name = "Käte", "réunion.1"
    path = tmp_path / unicodedata.normalize(there, folder) / unicodedata.normalize(there, name)
    path.parent.mkdir()
    write_audio(f"{path}{suffix}", make_speech(10))
    stem = str(tmp_path / unicodedata.normalize(listed, f"{folder}/{name}"))
    assert find_file(stem + ".wav") == find_audio(stem + ".mp4") == f"{path}{suffix}"
    assert find_file(stem + "2.wav") is None
    assert find_file(str(tmp_path / "none" / "a.wav")) is None


def test_a_missing_file_that_is_not_ascii_is_spelled_out(tmp_path):
    with pytest.raises(MediaError, match=r": no such file \(spelled '.*\\u0430.mp4'\)$"):
        read_video(tmp_path / "\u0430.mp4")


def _float_wav(path, samples):
    """Write 32-bit float wav, which can hold what is not finite."""
    data = samples.astype("<f4").tobytes()
    header = (
        b"RIFF" + (36 + len(data)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    )
    header += b"".join(
        value.to_bytes(size, "little")
        for value, size in [(3, 2), (1, 2), (16000, 4), (64000, 4), (4, 2), (32, 2)]
    )
    path.write_bytes(header + b"data" + len(data).to_bytes(4, "little") + data)


@pytest.mark.parametrize("read", [read_video, read_audio])
def test_errors_name_the_file_in_one_line(tmp_path, read):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    for name, cause in [
        ("missing.mp4", "no such file"),
        ("empty.mp4", "the file is empty"),
        ("broken.mp4", "cannot be decoded"),
        (".", "cannot be decoded"),
    ]:
        with pytest.raises(MediaError, match=cause) as error:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)


def test_errors_of_streams(tmp_path):
    write_video(tmp_path / "silent.mp4", make_picture(3))
    with pytest.raises(MediaError, match="no audio stream"):
        read_audio(tmp_path / "silent.mp4")
    write_audio(tmp_path / "a.wav", make_speech(100))
    with pytest.raises(MediaError, match="no video stream"):
        read_video(tmp_path / "a.wav")
    write_audio(tmp_path / "none.wav", make_speech(0))
    with pytest.raises(MediaError, match="holds no sample"):
        read_audio(tmp_path / "none.wav")
    _float_wav(tmp_path / "nan.wav", np.array([0.0, np.nan, 0.5]))
    with pytest.raises(MediaError, match="not finite"):
        read_audio(tmp_path / "nan.wav")
    _float_wav(tmp_path / "loud.wav", np.array([0.0, 3.0, -0.5]))
    torch.testing.assert_close(read_audio(tmp_path / "loud.wav"), torch.tensor([0.0, 1.0, -0.5]))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 32, 32), np.float32), "expected uint8"),
        (np.zeros((2, 32, 32, 4), np.uint8), "expected uint8"),
        (np.zeros((2, 31, 32), np.uint8), "even H, W"),
        (np.zeros((0, 32, 32), np.uint8), "T > 0"),
    ],
)
def test_write_video_errors(tmp_path, frames, message):
    with pytest.raises(MediaError, match=message):
        write_video(tmp_path / "a.mp4", frames)


def test_write_errors(tmp_path):
    with pytest.raises(MediaError, match="expected finite"):
        write_audio(tmp_path / "a.wav", np.array([np.inf]))
    with pytest.raises(MediaError, match="cannot write"):
        write_audio(tmp_path / "no" / "a.wav", make_speech(5))
    with pytest.raises(MediaError, match="cannot write"):
        write_video(tmp_path / "no" / "a.mp4", make_picture(2))


def test_writers_do_not_import_torch():
    code = "import sys, datamodule.media; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_studio_range_is_stretched_rounding_down():
    pictures = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)
    media._stretch_range(pictures)
    expected = [min(max(level - 16, 0), 219) * 255 // 219 for level in range(256)]
    assert pictures.ravel().tolist() == expected


def test_frames_may_differ_in_range(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", make_picture(5))
    ranges = [True, False, False, True, False]
    grey = iter((np.full((32, 32), 126, np.uint8), is_studio) for is_studio in ranges)
    monkeypatch.setattr(media, "_grey", lambda *_: next(grey))
    video = read_video(tmp_path / "a.mp4")
    assert video[:, 0, 0].tolist() == [128, 126, 126, 128, 126]
    assert (video == video[:, :1, :1]).all()


def flash_and_click(path):
    """Return when the flash and the click begin, in seconds from the first frame."""
    bright = read_video(path).float().mean((1, 2)) > 128
    loud = read_audio(path) > 0.4
    return bright.int().argmax().item() / 25, loud.int().argmax().item() / 16000


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("video_start", "audio_start"), [(0, 0), (0, 0.16), (0, 1.0), (0.5, 0), (0.3, 0.7), (5, 5.4)]
)
def test_streams_that_start_at_different_times(tmp_path, suffix, video_start, audio_start):
    path = tmp_path / f"a.{suffix}"
    at = video_start + 2.0
    write_flash_and_click(path, video_start=video_start, audio_start=audio_start, at=at)
    flash, click = flash_and_click(path)
    assert flash == pytest.approx(2.0)
    assert click == pytest.approx(2.0, abs=0.01)
    assert len(read_video(path)) == 75
    expected = audio_start - video_start
    assert media.audio_start(path) / 16000 == pytest.approx(expected, abs=0.065)  # one AAC frame
    assert len(read_audio(path)) / 16000 == pytest.approx(3 + expected, abs=0.1)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("fps", [25, 30])
@pytest.mark.parametrize("gap", [(0.4, 1.4), (1.0, 1.9), (2.3, 2.7)])
def test_gaps_in_the_streams(tmp_path, suffix, fps, gap):
    path = tmp_path / f"a.{suffix}"
    write_flash_and_click(path, fps=fps, gap=gap)
    flash, click = flash_and_click(path)
    assert flash == pytest.approx(2.0, abs=0.02)
    assert click == pytest.approx(2.0, abs=0.01)
    assert len(read_video(path)) == 75
    assert len(read_audio(path)) == pytest.approx(48000, abs=1100)


def test_a_small_difference_of_starts_changes_no_sample(tmp_path):
    for name, start in [("a", 0.0), ("b", 0.016)]:
        write_flash_and_click(tmp_path / f"{name}.mkv", audio_start=start, at=2.0 + start)
    assert torch.equal(read_audio(tmp_path / "a.mkv"), read_audio(tmp_path / "b.mkv"))


def test_time_stamps_that_jump(tmp_path):
    write_flash_and_click(tmp_path / "a.mkv", audio_start=90, at=91)
    with pytest.raises(MediaError, match="time stamps jump by 90 s, expected gaps of at most 60 s"):
        read_audio(tmp_path / "a.mkv")
    encode(tmp_path / "b.mkv", make_picture(2), times=[0, 100000])
    with pytest.raises(MediaError, match="time stamps jump by 100 s"):
        read_video(tmp_path / "b.mkv")


def test_sound_that_ends_before_the_video_starts(tmp_path):
    write_flash_and_click(tmp_path / "a.mkv", video_start=4, at=4)
    with pytest.raises(MediaError, match="the sound ends before the video starts"):
        read_audio(tmp_path / "a.mkv")


def test_a_cover_picture_does_not_move_the_sound(tmp_path):
    with av.open(str(tmp_path / "a.mp3"), "w") as container:
        audio = container.add_stream("mp3", rate=16000)
        audio.codec_context.layout = "mono"
        cover = container.add_stream("png", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt = "rgb24"
        container.start_encoding()
        frame = av.VideoFrame.from_ndarray(make_picture(1)[0], format="rgb24")
        frame.pts = 0
        container.mux(cover.encode(frame))
        container.mux(cover.encode(None))
        sound = av.AudioFrame.from_ndarray(make_speech(16000)[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
    assert media.audio_start(tmp_path / "a.mp3") == 0
    assert abs(len(read_audio(tmp_path / "a.mp3")) - 16000) < 3000


def turn(path, matrix):
    """Write the four numbers of a display matrix into the track header of an mp4 file."""
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44  # by ISO 14496-12, version 0
    assert struct.unpack(">9i", data[place : place + 36])[::4] == (1 << 16, 1 << 16, 1 << 30)
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a phone held upright: clockwise
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), np.transpose),
    ],
)
def test_the_display_matrix_turns_and_mirrors(tmp_path, matrix, turned):
    frames = make_picture(3, size=48)[:, :32]
    write_video(tmp_path / "a.mp4", frames)
    before = read_video(tmp_path / "a.mp4").numpy()
    turn(tmp_path / "a.mp4", matrix)
    after = read_video(tmp_path / "a.mp4").numpy()
    np.testing.assert_array_equal(after, [turned(image) for image in before])
    with av.open(str(tmp_path / "a.mp4")) as container:
        rotation = next(container.decode(video=0)).rotation
    if matrix[0] * matrix[3] - matrix[1] * matrix[2] > 0:  # no mirror
        np.testing.assert_array_equal(after[0], np.rot90(before[0], rotation // 90))


def test_a_picture_that_is_turned_askew(tmp_path):
    write_video(tmp_path / "a.mp4", make_picture(3))
    turn(tmp_path / "a.mp4", (1, 1, -1, 1))
    with pytest.raises(MediaError, match="turned askew, expected a multiple of 90 degrees"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(("keyframe", "expected"), [(2.0, 1.0), (4.0, -1.0)])
def test_a_cut_without_encoding(tmp_path, suffix, keyframe, expected):
    """Sound is cut where it is asked for, 3 s, video at a key frame before or after that."""
    rate = 16000
    write_flash_and_click(tmp_path / "whole.mp4", seconds=7.0, at=5.0, keyframes=50, b_frames=2)
    path = tmp_path / f"a.{suffix}"
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(path), "w") as part:
        streams = [whole.streams.video[0], whole.streams.audio[0]]
        copies = {stream.index: part.add_stream_from_template(stream) for stream in streams}
        begins = {streams[0].index: keyframe, streams[1].index: 3.0}
        for packet in whole.demux(streams):
            index = packet.stream.index
            if packet.dts is not None and packet.pts * packet.time_base >= begins[index]:
                packet.stream = copies[index]
                part.mux(packet)
    flash, click = flash_and_click(path)
    assert flash == pytest.approx(5.0 - keyframe)
    assert click == pytest.approx(flash, abs=0.01)
    assert media.audio_start(path) / rate == pytest.approx(expected, abs=0.1)
