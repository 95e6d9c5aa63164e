"""Tests of datamodule/bad_clip.py."""

from datamodule.bad_clip import BadClip, by_cause


def test_clips_are_summed_up_by_cause():
    clips = [
        BadClip(4, "d.mp4", "got frames of 64x64 pixels, expected 88x88"),
        BadClip(0, "a.mp4", "no such file"),
        BadClip(3, "c.mp4", "got frames of 48x50 pixels, expected 88x88"),
    ]
    assert by_cause(clips) == (
        "3 clips: 2 as c.mp4: got frames of 48x50 pixels, expected 88x88; 1 as a.mp4: no such file"
    )
    assert by_cause(clips[:1]).startswith("1 clip: 1 as d.mp4: got")
