"""Tests the demo corpus: its lists and clips, that it is deterministic, and what it refuses."""

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from datamodule import demo_corpus, demo_speech
from datamodule.demo_contact_sheet import write_contact_sheet
from datamodule.demo_corpus import main, make_demo_corpus, make_demo_corpus_of_job
from datamodule.demo_mouth import FRAME_SIZE, draw_face, render
from datamodule.demo_plan import ACCENTS, GRAMMAR, VARIANTS, draw_speakers, spoken_text
from datamodule.demo_speaker import make_clips
from datamodule.demo_speech import Phoneme, Synthesizer, Voice
from datamodule.demo_visemes import PHONEME_VISEMES, Shape, shape_track, visemes_of
from datamodule.media import read_audio, read_video

SIZES = {"num_train": 8, "num_val": 2, "num_test": 4}
needs_espeak = pytest.mark.skipif(
    demo_speech.importlib.util.find_spec(demo_speech.LOADER_PACKAGE) is None,
    reason="needs espeakng-loader, see requirements-demo.txt",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "corpus"
    assert make_demo_corpus(root, **SIZES, seed=3, num_workers=2, progress=False)
    return root


def digests(root):
    """Hash all files but the videos, whose encoder is not exact to the byte."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".mp4"]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@needs_espeak
def test_lists_and_clips_agree(corpus):
    units = dict(
        line.split()
        for line in (corpus / "spm" / "unigram_units.txt").read_text("utf-8").splitlines()
    )
    pieces = {index: piece for piece, index in units.items()}
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        rows = (corpus / "labels" / f"{split}.csv").read_text("utf-8").splitlines()
        if split == "train":  # which is shorter than the short list may be
            assert (corpus / "labels/train_240.csv").read_text("utf-8").splitlines() == rows
        transcripts = (corpus / "labels" / f"{split}.txt").read_text("utf-8").splitlines()
        assert len(rows) == len(transcripts) == count
        for row, transcript in zip(rows, transcripts, strict=True):
            dataset, path, num_frames, ids = row.split(",")
            name, *words = transcript.split()
            assert path == f"{name}.mp4"
            assert name.startswith(f"{split}/s")
            assert [pieces[index] for index in ids.split()] == ["▁" + word for word in words]
            assert all(word in group for word, group in zip(words, GRAMMAR, strict=True))
            video = read_video(corpus / dataset / path)
            audio = read_audio((corpus / dataset / path).with_suffix(".wav"))
            assert video.shape == (int(num_frames), FRAME_SIZE, FRAME_SIZE)
            assert audio.shape == (int(num_frames) * 640,)
            assert 1.2 < len(audio) / 16000 < 3.5
            speech = audio[3200:-6400]
            assert 0.03 < speech.square().mean().sqrt() < 0.12
            assert audio.abs().max() < 0.99
            assert audio[-640:].abs().max() < 0.05


@needs_espeak
def test_tokenizer_has_each_word_and_spells_others(corpus):
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(corpus / "spm" / "unigram.model")
    )
    for group in GRAMMAR:
        for word in group:
            assert processor.encode(word, out_type=str) == ["▁" + word]
    assert processor.decode(processor.encode("unheard words")) == "unheard words"
    lines = (corpus / "spm" / "unigram_units.txt").read_text("utf-8").splitlines()
    assert lines[0] == "<unk> 1"
    assert [int(line.split()[1]) for line in lines] == list(range(1, 80))


@needs_espeak
def test_babble_is_a_minute_of_speech(corpus):
    babble = read_audio(corpus / "noise" / "babble.wav")
    assert babble.shape == (60 * 16000,)
    loudness = babble.reshape(60, 16000).square().mean(dim=1).sqrt()  # of each second
    assert 0.04 < loudness.min()
    assert loudness.max() < 0.09
    assert babble.abs().max() < 0.99


@needs_espeak
def test_lists_and_wavs_do_not_depend_on_workers(corpus, tmp_path):
    assert make_demo_corpus(tmp_path, **SIZES, seed=3, num_workers=1, progress=False)
    expected, found = digests(corpus), digests(tmp_path)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    for path in corpus.rglob("*.mp4"):
        video, again = read_video(path), read_video(tmp_path / path.relative_to(corpus))
        assert (video.float() - again.float()).abs().mean() < 2.0


@needs_espeak
def test_complete_corpus_is_kept(corpus, capsys):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert not make_demo_corpus(corpus, **SIZES, seed=3)
    assert capsys.readouterr().out == f"keeping the demo corpus in {corpus}\n"
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    short_list = corpus / "labels/train_240.csv"
    expected = short_list.read_bytes()
    short_list.unlink()  # as corpora of earlier versions lack it
    assert not make_demo_corpus(corpus, **SIZES, seed=3, progress=False)
    assert short_list.read_bytes() == expected


@needs_espeak
def test_other_parameters_are_refused(corpus):
    with pytest.raises(ValueError, match=r"holds another demo corpus .*seed 3.* expected .*seed 4"):
        make_demo_corpus(corpus, **SIZES, seed=4, progress=False)
    with pytest.raises(ValueError, match="name another folder, or delete this one"):
        make_demo_corpus(corpus, **{**SIZES, "num_train": 9}, seed=3, progress=False)


@needs_espeak
def test_unfinished_corpus_is_made_again(tmp_path):
    sizes = {"num_train": 1, "num_val": 1, "num_test": 1, "progress": False}
    make_demo_corpus(tmp_path, **sizes)
    expected = digests(tmp_path)
    (tmp_path / "corpus.json").rename(tmp_path / "corpus.unfinished.json")
    next(tmp_path.rglob("*.wav")).write_bytes(b"half a")
    (tmp_path / "demo" / "leftover.mp4").write_bytes(b"of another run")
    assert make_demo_corpus(tmp_path, **sizes)
    assert digests(tmp_path) == expected
    assert not (tmp_path / "demo" / "leftover.mp4").exists()
    assert not (tmp_path / "corpus.unfinished.json").exists()


def test_folder_with_other_data_is_left_alone(tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "train.csv").write_text("mine")
    with pytest.raises(ValueError, match="already has a folder labels and no corpus.json"):
        make_demo_corpus(tmp_path, **SIZES, progress=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["labels", "train.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_val": 0}, "got 0 val sentences, expected at least 1"),
        ({"num_train": 64000}, "expected at most 64000"),
        ({"num_workers": 0}, "got 0 workers"),
        ({"seed": -1}, "got seed -1"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_demo_corpus(tmp_path / "new", **{**SIZES, **options}, progress=False)
    assert not (tmp_path / "new").exists()


def test_missing_espeak_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_speech, "LOADER_PACKAGE", "no_such_package")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "new")])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install -r requirements-demo.txt" in error
    assert not (tmp_path / "new").exists()


@needs_espeak
def test_failing_speaker_names_itself(tmp_path):
    speaker = draw_speakers({"train": 1, "val": 1, "test": 1}, 0)[0]
    (tmp_path / "train").write_text("a file in the way")
    with pytest.raises(RuntimeError, match="speaker s01 could not be made: .*Error"):
        make_clips([speaker], tmp_path, num_workers=1, on_clip=lambda *_: None)


def test_speakers_and_sentences_do_not_repeat():
    counts = {"train": 2000, "val": 100, "test": 160}
    speakers = draw_speakers(counts, 0)
    assert [speaker.split for speaker in speakers] == ["train"] * 40 + ["val"] * 4 + ["test"] * 8
    sentences = [text for speaker in speakers for text in speaker.sentences]
    assert len(set(sentences)) == len(sentences) == sum(counts.values())
    assert len({(s.voice.accent, s.voice.variant) for s in speakers}) == len(speakers)
    heard = {s.voice.variant for s in speakers if s.split == "train"}
    assert heard == set(VARIANTS)
    assert draw_speakers(counts, 0) == speakers
    assert draw_speakers(counts, 1) != speakers


def test_letters_are_spelt():
    assert spoken_text("bin blue at a zero again") == "bin blue at [[eI]] zero again"
    assert spoken_text("set red by q one now") == "set red by Q one now"


@needs_espeak
def test_each_accent_and_variant_speaks_known_phonemes():
    synthesizer = Synthesizer(0)
    voices = [(accent, "m3") for accent in ACCENTS] + [("en", variant) for variant in VARIANTS]
    text = spoken_text(" ".join(word for group in GRAMMAR for word in group))
    for accent, variant in voices:
        synthesizer.set_voice(Voice(accent, variant, pitch=50, pitch_range=50, rate=160))
        samples, phonemes = synthesizer.speak(text)
        assert samples.dtype == np.float32
        assert len(phonemes) > 100
        assert all(p.start < p.end for p in phonemes)
        assert phonemes[-1].end <= len(samples) / 16000 + 0.01
        for phoneme in phonemes:
            ends = range(1, len(phoneme.name) + 1)
            assert any(phoneme.name[:end] in PHONEME_VISEMES for end in ends), phoneme.name
    for accent, variant in (("en", "no_such_variant"), ("no-such-accent", "m1")):
        with pytest.raises(ValueError, match=f"no voice {accent}\\+{variant}"):
            synthesizer.set_voice(Voice(accent, variant, pitch=50, pitch_range=50, rate=160))


def test_phonemes_of_one_viseme_look_the_same():
    def track(name):
        phonemes = [Phoneme(name, 0.2, 0.3), Phoneme("eI", 0.3, 0.5)]
        return shape_track(phonemes, 20, clarity=0.5, random=np.random.default_rng(0))

    for names in (("p", "b", "m"), ("f", "v"), ("t", "d", "n", "s", "z", "l"), ("i:", "I")):
        for name in names[1:]:
            np.testing.assert_array_equal(track(name), track(names[0]))
    assert np.abs(track("p") - track("f")).max() > 0.1
    assert visemes_of("aI2") == visemes_of("aI")
    assert len(visemes_of("no such phoneme")) == 1


def test_mouth_opens_in_the_picture():
    shut, wide = Shape(opening=-0.1, press=0.6), Shape(opening=0.8, teeth=0.5, tongue=0.3)
    track = np.array([shut] * 5 + [wide] * 5, np.float32)
    for seed in range(4):
        random = np.random.default_rng(seed)
        face = draw_face(random)
        frames = render(face, track, random)
        assert frames.shape == (10, FRAME_SIZE, FRAME_SIZE, 3)
        assert frames.dtype == np.uint8
        grey = frames.astype(np.float32).mean(axis=(0, 3))
        assert grey[40:60, 35:60].mean() < grey[20:30, 35:60].mean()  # lips are darker than skin
        change = np.abs(frames[5:].astype(np.float32) - frames[:5]).mean(axis=(0, 3))
        assert change[40:70, 35:60].mean() > 4 * change[:12, :12].mean()


@needs_espeak
def test_contact_sheet(corpus, tmp_path):
    from PIL import Image

    write_contact_sheet(corpus, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 12 * FRAME_SIZE
        assert sheet.height > FRAME_SIZE
    assert (tmp_path / "sheet.png").stat().st_size < 300_000


def test_workers_do_not_import_torch():
    code = "import sys, datamodule.demo_speaker; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@needs_espeak
def test_description_names_the_speakers(corpus):
    description = json.loads((corpus / "corpus.json").read_text("utf-8"))
    assert description["seed"] == 3
    assert description["sentences"] == {"train": 8, "val": 2, "test": 4}
    assert [s["split"] for s in description["speakers"]] == ["train", "train", "val", "test"]


def start_waiting(root, monkeypatch):
    """A process of a job that is not the first, in a thread; returns it and its errors."""
    soon = threading.Event()
    monkeypatch.setattr(demo_corpus.time, "sleep", lambda _: soon.wait(0.01))
    monkeypatch.setenv("LOCAL_RANK", "1")
    errors = []

    def wait():
        try:
            make_demo_corpus_of_job(str(root))
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, errors


def test_if_the_first_process_fails_the_others_do(tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "labels").mkdir(parents=True)
    thread, errors = start_waiting(root, monkeypatch)
    thread.join(0.2)
    assert thread.is_alive()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="already has a folder labels"):
        make_demo_corpus_of_job(str(root))
    thread.join(10)
    assert not thread.is_alive()
    assert "the first process could not make the demo corpus: " in errors[0]
    assert "already has a folder labels" in errors[0]
    # The note of an earlier job does not stop the next one.
    thread, errors = start_waiting(root, monkeypatch)
    thread.join(0.2)
    assert thread.is_alive()
    (root / demo_corpus.DESCRIPTION_FILE).write_text("{}")
    thread.join(10)
    assert "holds another demo corpus" in errors[0]


def test_nobody_waits_for_ever_for_a_first_process_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_corpus, "PATIENCE_S", 0.5)
    thread, errors = start_waiting(tmp_path, monkeypatch)
    for number in range(4):  # As long as files come, it waits.
        thread.join(0.3)
        assert thread.is_alive()
        (tmp_path / f"{number}.mp4").touch()
    thread.join(10)
    assert "no file has come to" in errors[0]
