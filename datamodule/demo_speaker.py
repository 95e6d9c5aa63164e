"""Makes all clips of one speaker of the demo corpus, in a process of its own.

espeak-ng's samples depend on what the process spoke before, so each speaker gets a fresh
interpreter. It imports neither torch nor anything else that is slow to start.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from datamodule.demo_mouth import Face, draw_face, render
from datamodule.demo_plan import Speaker, spoken_text
from datamodule.demo_speech import Phoneme, Synthesizer, Voice
from datamodule.demo_visemes import shape_track
from datamodule.media import write_audio, write_video
from espnet.formats import AUDIO_RATE, SAMPLES_PER_FRAME

PAUSES_S = (0.05, 0.1)  # silence before and after a sentence
RATE_SPREAD = 0.05  # of the speaker's rate, from sentence to sentence
PITCH_SPREAD = 3
ROOM_NOISE = 0.0005  # root mean square, full scale 1
VIDEO_QUALITY = 20  # crf of x264

WORKER_COMMAND = (sys.executable, "-m", "datamodule.demo_speaker")
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")}


def make_clips(
    speakers: Sequence[Speaker],
    folder: Path,
    *,
    num_workers: int,
    on_clip: Callable[[str, int], None],
) -> None:
    """Make the clips of all speakers, each speaker in a fresh process.

    Args:
        speakers: Who says what.
        folder: The dataset's folder; the clips come to `split/speaker/name.mp4` and `.wav`.
        num_workers: How many processes run at a time.
        on_clip: Called with name and number of frames of each finished clip, from several threads.

    Raises:
        RuntimeError: A process fails; the message holds the last line that it wrote.
    """
    running: set[subprocess.Popen] = set()

    def run(speaker: Speaker) -> None:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as job:
            json.dump({"folder": str(folder.resolve()), **asdict(speaker)}, job)
            job.seek(0)
            process = subprocess.Popen(
                WORKER_COMMAND,
                cwd=Path(__file__).resolve().parents[1],
                env={**os.environ, **ONE_THREAD},
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        running.add(process)
        last_line = ""
        with process:
            for line in process.stdout:
                name, tab, num_frames = line.strip().partition("\t")
                if tab and num_frames.isdecimal():
                    on_clip(name, int(num_frames))
                else:
                    last_line = line.strip() or last_line
        running.discard(process)
        if process.returncode != 0:
            raise RuntimeError(f"speaker {speaker.name} could not be made: {last_line}")

    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(run, speaker) for speaker in speakers]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(running):
                process.terminate()
            raise


def make_clip(
    synthesizer: Synthesizer,
    speaker: Speaker,
    face: Face,
    sentence: str,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Speak and draw one sentence; pauses, rate, pitch and all noise are random.

    Returns:
        Samples float32 (S,) at 16 kHz and frames uint8 (T, H, W, 3) at 25 per second; S = 640 T.
    """
    voice = replace(
        speaker.voice,
        rate=round(speaker.voice.rate * random.uniform(1 - RATE_SPREAD, 1 + RATE_SPREAD)),
        pitch=speaker.voice.pitch + int(random.integers(-PITCH_SPREAD, PITCH_SPREAD + 1)),
    )
    synthesizer.set_voice(voice)
    speech, phonemes = synthesizer.speak(spoken_text(sentence))
    before, after = (round(pause * AUDIO_RATE) for pause in random.uniform(*PAUSES_S, 2))
    num_frames = math.ceil((before + len(speech) + after) / SAMPLES_PER_FRAME)
    samples = ROOM_NOISE * random.standard_normal(num_frames * SAMPLES_PER_FRAME, np.float32)
    samples[before : before + len(speech)] += speech

    delay = before / AUDIO_RATE
    phonemes = [Phoneme(p.name, p.start + delay, p.end + delay) for p in phonemes]
    track = shape_track(phonemes, num_frames, clarity=face.clarity, random=random)
    return samples, render(face, track, random)


def main() -> None:
    """Read a job from standard input, make its clips, and print `name, tab, frames` for each."""
    job = json.load(sys.stdin)
    folder = Path(job.pop("folder"))
    voice = Voice(**job.pop("voice"))
    speaker = Speaker(**{**job, "voice": voice})
    synthesizer = Synthesizer(speaker.seed[-1])
    face = draw_face(np.random.default_rng(speaker.seed))
    (folder / speaker.split / speaker.name).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(speaker.utterance_names()):
        random = np.random.default_rng([*speaker.seed, index + 1])
        sentence = speaker.sentences[index]
        samples, frames = make_clip(synthesizer, speaker, face, sentence, random)
        write_audio(folder / f"{name}.wav", samples)
        write_video(folder / f"{name}.mp4", frames, crf=VIDEO_QUALITY)
        print(f"{name}\t{len(frames)}", flush=True)


if __name__ == "__main__":
    main()
