"""Shows consecutive frames of some speakers of the demo corpus in one picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from espnet.formats import VIDEO_RATE

NUM_FRAMES = 12
NUM_SPEAKERS = 4
CAPTION_HEIGHT = 16
NUM_COLOURS = 256  # keeps the file small


def write_contact_sheet(root_dir: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write a PNG with a row of consecutive frames for each of some test speakers of a corpus."""
    root = Path(root_dir)
    transcripts = (root / "labels" / "test.txt").read_text(encoding="utf-8").splitlines()
    by_speaker: dict[str, str] = {}
    for line in transcripts:
        by_speaker.setdefault(Path(line.split()[0]).parent.name, line)
    speakers = json.loads((root / "corpus.json").read_text(encoding="utf-8"))["speakers"]
    accents = {speaker["name"]: speaker["accent"] for speaker in speakers}
    rows = []
    step = max(1, len(by_speaker) // NUM_SPEAKERS)
    for speaker, line in list(by_speaker.items())[::step][:NUM_SPEAKERS]:
        name, _, text = line.partition(" ")
        frames = _read_colour(root / "demo" / f"{name}.mp4")
        first = max(0, (len(frames) - NUM_FRAMES) // 2)  # the middle of the sentence
        frames = frames[first : first + NUM_FRAMES]
        start, end = first / VIDEO_RATE, (first + len(frames)) / VIDEO_RATE
        caption = f'{speaker}, {accents[speaker]}: "{text}", {start:.2f} to {end:.2f} s'
        rows.append(_row(frames, caption))
    sheet = Image.fromarray(np.concatenate(rows)).quantize(NUM_COLOURS)
    sheet.save(path, format="PNG", optimize=True)


def _row(frames: np.ndarray, caption: str) -> np.ndarray:
    """Put frames side by side below a caption: (T, H, W, 3) -> (CAPTION_HEIGHT + H, T * W, 3)."""
    strip = np.concatenate(list(frames), axis=1)
    head = Image.new("RGB", (strip.shape[1], CAPTION_HEIGHT), "white")
    ImageDraw.Draw(head).text((4, 2), caption, fill="black")
    return np.concatenate([np.asarray(head), strip])


def _read_colour(path: Path) -> np.ndarray:
    """Decode a video in colour: uint8 (T, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
