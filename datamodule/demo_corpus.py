"""Makes the demo corpus: synthetic speakers, heard and seen, say sentences of the GRID grammar."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datamodule.demo_plan import GRAMMAR, SPLITS, Speaker, draw_speakers
from datamodule.demo_speaker import make_clips
from datamodule.demo_speech import SPEECH_LEVEL, require_espeak
from datamodule.media import read_audio, write_audio
from datamodule.train_tokenizer import train_tokenizer
from espnet.formats import AUDIO_RATE

DATASET = "demo"
VERSION = 1  # to be raised when the same parameters give other clips
SHORT_LIST, SHORT_ROWS = "train_240.csv", 240  # for what learns from little
PARTS = (DATASET, "labels", "noise", "spm")  # the folders that a corpus consists of
DESCRIPTION_FILE = "corpus.json"  # written last: a corpus that has it is complete
UNFINISHED_FILE = "corpus.unfinished.json"  # marks a folder that this module is filling
FAILED_FILE = "corpus.failed.txt"  # tells the other processes of a job why there is no corpus
PATIENCE_S = 300.0  # in which a process that makes a corpus writes at least a file
BABBLE_S = 60
BABBLE_VOICES = 8
WORD_START = "▁"


def make_demo_corpus(
    root_dir: str | os.PathLike[str],
    *,
    num_train: int = 2000,
    num_val: int = 100,
    num_test: int = 160,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> bool:
    """Make the demo corpus in a folder, or keep the one that is there.

    Under the folder come `demo/split/speaker/*.mp4` and `.wav`, `labels/train.csv`, `val.csv` and
    `test.csv` in auto_avsr's format (token ids in the last field) with the transcripts beside them
    as `.txt`, `noise/babble.wav`, `spm/unigram.model` and `spm/unigram_units.txt`, and
    `corpus.json`. All of it follows from the parameters, whatever the number of workers: lists,
    tokenizer and wav files are the same to the byte, and so are the pictures before they are
    encoded. (What H.264 loses differs a little from run to run.)

    Args:
        root_dir: The folder; made if it is not there.
        num_train: Number of training sentences.
        num_val: Number of validation sentences, by speakers of their own.
        num_test: Number of test sentences, by speakers of their own.
        seed: Seed of everything that is drawn.
        num_workers: Processes at a time; as many as there are cores if None.
        progress: Whether to show a progress bar, or to say that the corpus is kept.

    Returns:
        True if the corpus was made, False if a complete one with the same parameters was kept.

    Raises:
        ValueError: espeakng-loader is not installed, a number is out of range, or the folder
            holds a corpus made with other parameters or files of another origin.
    """
    root = Path(root_dir)
    counts = {"train": num_train, "val": num_val, "test": num_test}
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"got {num_workers} workers, expected at least 1")
    if seed < 0:
        raise ValueError(f"got seed {seed}, expected 0 or more")
    speakers = draw_speakers(counts, seed)
    parameters = {"version": VERSION, "seed": seed, "sentences": counts}
    if _is_complete(root, parameters):
        if not (root / "labels" / SHORT_LIST).exists():  # made by an earlier version
            _write_short_list(root)
        if progress:
            print(f"keeping the demo corpus in {root}")
        return False
    require_espeak()
    _clear(root, parameters)

    num_frames: dict[str, int] = {}
    on_terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(counts.values()),
        desc="demo corpus",
        unit="clip",
        disable=not progress,
        mininterval=0.1 if on_terminal else 10.0,
    ) as bar:

        def on_clip(name: str, frames: int) -> None:
            num_frames[name] = frames
            bar.update()

        make_clips(
            speakers, root / DATASET, num_workers=num_workers or _num_cores(), on_clip=on_clip
        )
    _write_babble(root, [speaker for speaker in speakers if speaker.split == "train"], seed)
    _write_lists(root, speakers, num_frames)
    _write_short_list(root)
    description = {**parameters, "speakers": [_describe(speaker) for speaker in speakers]}
    _write_text(root / UNFINISHED_FILE, json.dumps(description, indent=1) + "\n")
    (root / UNFINISHED_FILE).replace(root / DESCRIPTION_FILE)
    return True


def make_demo_corpus_of_job(root_dir: str) -> None:
    """Make the demo corpus in a job of several processes: the first makes it, the others wait.

    Raises:
        ValueError: As `make_demo_corpus`, in all processes, or nothing has been written for
            minutes.
    """
    failed = Path(root_dir) / FAILED_FILE
    if any(int(os.environ.get(name) or 0) for name in ("LOCAL_RANK", "SLURM_PROCID", "RANK")):
        _wait_for_demo_corpus(Path(root_dir))
        make_demo_corpus(root_dir, progress=False)  # Keeps it, or refuses it as the first does.
        return
    failed.unlink(missing_ok=True)
    try:
        make_demo_corpus(root_dir)
    except BaseException as error:
        if any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS")):
            with suppress(OSError):
                failed.parent.mkdir(parents=True, exist_ok=True)
                _write_text(failed, f"{str(error) or type(error).__name__}\n")
        raise


def _wait_for_demo_corpus(root: Path) -> None:
    """Wait until the first process has made a corpus; it may fail, or be gone."""
    began = time.time()
    last_change, seen = time.monotonic(), None
    while not (root / DESCRIPTION_FILE).is_file():
        failed = root / FAILED_FILE
        with suppress(OSError):  # It may be removed at any time.
            if failed.stat().st_mtime >= began:  # not of an earlier job
                cause = failed.read_text(encoding="utf-8").strip()
                raise ValueError(f"the first process could not make the demo corpus: {cause}")
        if (state := _folder_times(root)) != seen:
            last_change, seen = time.monotonic(), state
        if time.monotonic() - last_change > PATIENCE_S:
            raise ValueError(
                f"no file has come to {root} for {PATIENCE_S:.0f} s, and the demo corpus in it is "
                "not complete: see what the first process says; all processes must share the folder"
            )
        time.sleep(1)


def _folder_times(root: Path) -> dict[str, float]:
    """When a file last came to each folder."""
    times = {}
    for folder, _, _ in os.walk(root):
        with suppress(OSError):
            times[folder] = os.stat(folder).st_mtime
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when the corpus is there."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodule.demo_corpus",
        description="Make the demo corpus, or complete or keep the one that is in the folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("root_dir", metavar="DIR", help="folder of the corpus")
    parser.add_argument("--num-train", type=int, default=2000, metavar="N", help="sentences")
    parser.add_argument("--num-val", type=int, default=100, metavar="N", help="sentences")
    parser.add_argument("--num-test", type=int, default=160, metavar="N", help="sentences")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides every choice")
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="processes at a time; None: one a core"
    )
    parser.add_argument(
        "--contact-sheet", metavar="FILE", help="also write a PNG of some speakers' mouths"
    )
    options = vars(parser.parse_args(arguments))
    contact_sheet = options.pop("contact_sheet")
    try:
        made = make_demo_corpus(**options)
        if contact_sheet:
            from datamodule.demo_contact_sheet import write_contact_sheet

            write_contact_sheet(options["root_dir"], contact_sheet)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; run it again to make the corpus\n")
    if made:
        print(f"the demo corpus is in {options['root_dir']}")
    return 0


def _is_complete(root: Path, parameters: dict) -> bool:
    """Tell whether a folder holds the corpus of these parameters; another one is an error."""
    try:
        description = json.loads((root / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:
        description = {}
    found = {key: description.get(key) for key in parameters}
    if found != parameters:
        raise ValueError(
            f"{root} holds another demo corpus ({_summary(found)}), expected "
            f"{_summary(parameters)}: name another folder, or delete this one"
        )
    return True


def _summary(parameters: dict) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in parameters.items())


def _clear(root: Path, parameters: dict) -> None:
    """Mark a folder as being filled, and empty it of what an interrupted run left."""
    root.mkdir(parents=True, exist_ok=True)
    present = [part for part in PARTS if (root / part).exists()]
    if present and not (root / UNFINISHED_FILE).exists():
        raise ValueError(
            f"{root} already has a folder {present[0]} and no {DESCRIPTION_FILE}, expected a new "
            "folder or a demo corpus: name another folder"
        )
    _write_text(root / UNFINISHED_FILE, json.dumps(parameters) + "\n")
    for part in present:
        shutil.rmtree(root / part)


def _write_babble(root: Path, speakers: list[Speaker], seed: int) -> None:
    """Write overlapping voices: each is a chain of sentences by random speakers of a list."""
    random = np.random.default_rng([seed, 1])
    names = [name for speaker in speakers for name in speaker.utterance_names()]
    mixture = np.zeros(BABBLE_S * AUDIO_RATE, np.float32)
    for _ in range(BABBLE_VOICES):
        position = -int(random.integers(AUDIO_RATE))  # so that the voices do not start together
        while position < len(mixture):
            name = names[random.integers(len(names))]
            samples = read_audio(root / DATASET / f"{name}.wav").numpy()[max(0, -position) :]
            position = max(0, position)
            samples = samples[: len(mixture) - position]
            mixture[position : position + len(samples)] += samples
            position += len(samples)
    loudness = np.sqrt(np.mean(np.square(mixture, dtype=np.float64)))
    (root / "noise").mkdir()
    write_audio(root / "noise" / "babble.wav", mixture * np.float32(SPEECH_LEVEL / loudness))


def _write_lists(root: Path, speakers: list[Speaker], num_frames: dict[str, int]) -> None:
    """Train the tokenizer on the training sentences, and write label lists and transcripts."""
    from datamodule.text_transform import TextTransform

    words = [word for group in GRAMMAR for word in group]
    characters = sorted({character for word in words for character in word})
    training = [
        text for speaker in speakers if speaker.split == "train" for text in speaker.sentences
    ]
    prefix = root / "spm" / "unigram"
    train_tokenizer(
        [*training, *words],  # a small corpus does not have every word
        prefix,
        # The words, the characters by themselves for other words, <unk>, <s> and </s>.
        vocab_size=len(words) + len([WORD_START, *characters]) + 3,
        seed_pieces=[WORD_START + word for word in words],
    )
    text_transform = TextTransform(sp_model_path=f"{prefix}.model")
    (root / "labels").mkdir()
    for split in SPLITS:
        rows, transcripts = [], []
        for speaker in speakers:
            if speaker.split != split:
                continue
            for name, text in zip(speaker.utterance_names(), speaker.sentences, strict=True):
                ids = " ".join(map(str, text_transform.tokenize(text).tolist()))
                rows.append(f"{DATASET},{name}.mp4,{num_frames[name]},{ids}\n")
                transcripts.append(f"{name} {text}\n")
        _write_text(root / "labels" / f"{split}.csv", "".join(rows))
        _write_text(root / "labels" / f"{split}.txt", "".join(transcripts))


def _write_short_list(root: Path) -> None:
    """Write every n-th row of the training list, so that all speakers are there, as SHORT_LIST."""
    rows = (root / "labels/train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    step = max(1, len(rows) // SHORT_ROWS)
    _write_text(root / "labels" / SHORT_LIST, "".join(rows[::step][:SHORT_ROWS]))


def _describe(speaker: Speaker) -> dict:
    """Say who a speaker is, for people to read."""
    return {
        "name": speaker.name,
        "split": speaker.split,
        "sentences": len(speaker.sentences),
        **vars(speaker.voice),
    }


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _num_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
