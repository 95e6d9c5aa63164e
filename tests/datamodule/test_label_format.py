"""Tests of datamodule/label_format.py."""

import numpy as np
import pytest

from datamodule.label_format import holds_ids
from datamodule.label_list import LabelList
from datamodule.text_transform import TextTransform
from datamodule.train_tokenizer import train_tokenizer

DIGITS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
WORDS = [first + last for first in ("bi", "gree", "la", "so", "pu") for last in "nytsdr"]


def sentences(words, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, rng.integers(2, 6))) for _ in range(300)]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Of words, of words and digits, and of digits."""
    found = {}
    for name, words in {"words": WORDS, "both": WORDS + DIGITS, "digits": DIGITS}.items():
        prefix = tmp_path_factory.mktemp(name) / "unigram"
        whole = [] if name == "digits" else [f"\u2581{word}" for word in WORDS]
        characters = len({*"".join(words), " "})
        train_tokenizer(
            sentences(words),
            prefix,
            vocab_size=characters + 3 + len(whole),
            seed_pieces=whole or None,
        )
        found[name] = TextTransform(sp_model_path=f"{prefix}.model")
    return found


@pytest.fixture
def write(tmp_path):
    def write_list(fields):
        (tmp_path / "labels").mkdir(exist_ok=True)
        rows = [f"s,{n}.mp4,25,{field}\n" for n, field in enumerate(fields)]
        (tmp_path / "labels" / "train.csv").write_text("".join(rows), encoding="utf-8")
        return LabelList(str(tmp_path), "train.csv")

    return write_list


def ids_of(vocabulary, words):
    rows = [vocabulary.tokenize(text).tolist() for text in sentences(words, seed=1)]
    return [" ".join(map(str, row)) for row in rows]


@pytest.mark.parametrize("label_format", ["auto", "ids"])
@pytest.mark.parametrize("name", ["words", "both"])
@pytest.mark.parametrize("size", [6, 300])
def test_ids_of_the_vocabulary_are_found(write, vocabularies, name, size, label_format):
    labels = write(ids_of(vocabularies[name], WORDS)[:size])
    assert holds_ids(labels, label_format, vocabularies[name])


@pytest.mark.parametrize("name", ["words", "both", "digits"])
@pytest.mark.parametrize("fields", [["2 3 8"], ["7"], ["007", "19 84"], sentences(DIGITS)])
def test_transcripts_in_digits_need_the_option(write, vocabularies, fields, name):
    labels = write(fields)
    with pytest.raises(ValueError, match=r"line \d+: .*--label-format") as error:
        holds_ids(labels, "auto", vocabularies[name])
    assert "\n" not in str(error.value)
    assert not holds_ids(labels, "text", vocabularies[name])


@pytest.mark.parametrize("share", [1, 50, 99])
def test_a_row_of_words_makes_a_list_of_digits_text(write, vocabularies, share):
    digits = sentences(DIGITS)[:share]
    labels = write([*digits, *["bin lay"] * (100 - share)])
    assert not holds_ids(labels, "auto", vocabularies["both"])


def test_a_row_that_is_no_ids_is_named(write, vocabularies):
    ids = ids_of(vocabularies["words"], WORDS)[:20]
    for wrong in ("12 x", "-5", "1.5", "٣"):
        with pytest.raises(ValueError, match=r"line 4: got .*, expected token ids .*format text"):
            holds_ids(write([*ids[:3], wrong, *ids[3:]]), "auto", vocabularies["words"])
    with pytest.raises(ValueError, match=r"line 1: got 'bin', expected token ids"):
        holds_ids(write(["bin", "lay"]), "ids", vocabularies["words"])


def test_ids_of_another_vocabulary_are_refused(write, vocabularies):
    labels = write(ids_of(vocabularies["words"], WORDS))
    for label_format in ("auto", "ids"):
        with pytest.raises(ValueError, match=r"token id \d+ is outside .* 1 to 12; was the list"):
            holds_ids(labels, label_format, vocabularies["digits"])


def test_numbers_are_ids_where_the_vocabulary_knows_no_text(write, tmp_path):
    """Its units are not the pieces of the SentencePiece model."""
    (tmp_path / "units.txt").write_text("".join(f"w{n} {n}\n" for n in (1, 2)) + "<unk> 3\n")
    train_tokenizer(sentences(WORDS), tmp_path / "unigram", vocab_size=20)
    paths = {"sp_model_path": f"{tmp_path}/unigram.model", "dict_path": tmp_path / "units.txt"}
    assert holds_ids(write(["1 2 3"]), "auto", TextTransform(**paths))


def test_ids_that_are_read_as_text_are_told(write, vocabularies, caplog):
    assert not holds_ids(write(sentences(DIGITS)), "text", vocabularies["both"])
    assert not caplog.records
    labels = write(ids_of(vocabularies["both"], WORDS))
    assert not holds_ids(labels, "text", vocabularies["both"])
    assert "train.csv is read as text, but looks like token ids" in caplog.text
