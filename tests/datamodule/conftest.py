"""Small media files, label lists and vocabularies."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from media_files import make_picture, make_speech

from datamodule.media import write_audio, write_video
from datamodule.text_transform import TextTransform

WORDS = ["bin", "blue", "at", "again", "lay", "green", "by", "now", "please", "soon"]


@dataclass
class Corpus:
    """A folder with clips and one label list for each kind of last field."""

    root: Path
    num_frames: list[int]
    texts: list[str]

    def write_list(self, name, rows):
        (self.root / "labels").mkdir(exist_ok=True)
        (self.root / "labels" / name).write_text("".join(f"{row}\n" for row in rows))
        return name


@pytest.fixture(scope="session")
def sp_model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece")
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.permutation(WORDS)[:4]) for _ in range(100)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(path / "bpe"),
        model_type="bpe",
        vocab_size=50,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(path / "bpe.model")


@pytest.fixture(scope="session")
def text_transform(sp_model_path):
    return TextTransform(sp_model_path=sp_model_path)


@pytest.fixture
def corpus(tmp_path, text_transform):
    """Five clips of 20 to 36 frames with wav files, listed as ids.csv and text.csv."""
    rng = np.random.default_rng(1)
    num_frames = [20, 24, 28, 32, 36]
    texts = [" ".join(rng.permutation(WORDS)[:3]) for _ in num_frames]
    (tmp_path / "set" / "clips").mkdir(parents=True)
    corpus = Corpus(root=tmp_path, num_frames=num_frames, texts=texts)
    rows = []
    for index, length in enumerate(num_frames):
        stem = tmp_path / "set" / "clips" / f"{index}"
        write_video(stem.with_suffix(".mp4"), make_picture(length, seed=index))
        write_audio(stem.with_suffix(".wav"), make_speech(640 * length + 100, seed=index))
        rows.append(f"set,clips/{index}.mp4,{length},")
    corpus.write_list("text.csv", [row + text for row, text in zip(rows, texts, strict=True)])
    ids = [" ".join(map(str, text_transform.tokenize(text).tolist())) for text in texts]
    corpus.write_list("ids.csv", [row + words for row, words in zip(rows, ids, strict=True)])
    return corpus
