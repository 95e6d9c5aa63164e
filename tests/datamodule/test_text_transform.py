"""Tests of datamodule/text_transform.py."""

import pickle

import pytest
import sentencepiece
import torch

from datamodule.text_transform import TextTransform
from datamodule.train_tokenizer import train_tokenizer

TEXT = "bin blue at again"


@pytest.fixture
def units(sp_model_path, tmp_path):
    """Write a units file that lists the pieces in the order of the alphabet."""
    processor = sentencepiece.SentencePieceProcessor(model_file=sp_model_path)
    pieces = sorted(processor.id_to_piece(index) for index in range(3, processor.get_piece_size()))
    lines = [f"{piece} {index}" for index, piece in enumerate(["<unk>", *pieces], start=1)]
    (tmp_path / "units.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "units.txt"


def test_vocabulary_of_the_model(text_transform, sp_model_path):
    processor = sentencepiece.SentencePieceProcessor(model_file=sp_model_path)
    pieces = [processor.id_to_piece(index) for index in range(3, processor.get_piece_size())]
    assert text_transform.token_list == ["<blank>", "<unk>", *pieces, "<eos>"]
    assert text_transform.odim == len(pieces) + 3
    assert text_transform.sos == text_transform.eos == text_transform.odim - 1


@pytest.mark.parametrize("with_units", [True, False])
def test_round_trip(sp_model_path, units, with_units):
    transform = TextTransform(
        sp_model_path=sp_model_path, dict_path=str(units) if with_units else None
    )
    ids = transform.tokenize(TEXT)
    assert ids.dtype == torch.int64
    processor = sentencepiece.SentencePieceProcessor(model_file=sp_model_path)
    pieces = processor.encode(TEXT, out_type=str)
    assert [transform.token_list[index] for index in ids] == pieces
    assert transform.post_process(ids) == TEXT
    assert transform.post_process(ids.tolist()) == TEXT


def test_ids_are_those_of_the_units_file(sp_model_path, units):
    transform = TextTransform(sp_model_path=sp_model_path, dict_path=str(units))
    listed = dict(line.split() for line in units.read_text(encoding="utf-8").splitlines())
    for piece, index in listed.items():
        assert transform.token_list[int(index)] == piece


def test_special_ids_are_no_text(text_transform):
    ids = text_transform.tokenize(TEXT).tolist()
    padded = [text_transform.sos, 0, *ids, text_transform.eos, -1, -1]
    assert text_transform.post_process(torch.tensor(padded)) == TEXT
    assert text_transform.post_process([]) == ""


def test_unknown_pieces(text_transform):
    assert text_transform.token_list[int(text_transform.tokenize("at %")[-1])] == "<unk>"
    assert len(text_transform.tokenize("")) == 0


def test_pickles(text_transform):
    copy = pickle.loads(pickle.dumps(text_transform))
    assert copy.tokenize(TEXT).tolist() == text_transform.tokenize(TEXT).tolist()


def test_bad_model(tmp_path):
    with pytest.raises(ValueError, match="cannot read the SentencePiece model: No such file"):
        TextTransform(sp_model_path=str(tmp_path / "none.model"))
    for name, data in [("empty.model", b""), ("text.model", b"hello" * 10)]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: not a SentencePiece model"):
            TextTransform(sp_model_path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<unk> 1\nb\n", "line 2: got 'b', expected 'piece 2'"),
        ("<unk> 1\nb 3\n", "line 2: got 'b 3', expected 'piece 2'"),
        ("<unk> one\n", "line 1: got '<unk> one', expected 'piece 1'"),
        ("a 1\nb 2\n", "has no <unk>"),
        ("", "has no <unk>"),
        (b"\xff 1\n", "not UTF-8"),
    ],
)
def test_bad_units(sp_model_path, tmp_path, text, message):
    path = tmp_path / "units.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        TextTransform(sp_model_path=sp_model_path, dict_path=str(path))
    assert str(path) in str(error.value)


def test_missing_units(sp_model_path, tmp_path):
    with pytest.raises(ValueError, match="cannot read the units file: No such file"):
        TextTransform(sp_model_path=sp_model_path, dict_path=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ｂｉｎ　ｂｌｕｅ", "bin blue"),
        ("bin\u2028 blue\u00a0at", "bin blue at"),
        ("ﬁne ½ Äbc", "fine 1⁄2 Äbc"),
        (" unknown: ж ", "unknown: ж"),
        ("e\u0301", "é"),
        ("\u200b", ""),
    ],
)
def test_text_as_the_model_writes_it(text_transform, text, expected):
    assert text_transform.normalize(text) == expected
    assert text_transform.normalize(expected) == expected


def test_what_a_perfect_model_writes_has_no_error(text_transform):
    """Whatever forms the characters of a reference have."""
    for text in ("ｂｉｎ　ｂｌｕｅ", "bin  again", "ｐｌｅａｓｅ\u3000now"):
        hypothesis = text_transform.post_process(text_transform.tokenize(text))
        assert text_transform.normalize(text) == hypothesis


def test_what_has_no_token_is_listed(text_transform):
    assert text_transform.unknown("bin ｂｌｕｅ at\u3000again") == []
    assert text_transform.unknown("bin BLUE at Ж!") == ["BLUE", "Ж!"]
    unknown = text_transform.token_list.index("<unk>")
    assert (text_transform.tokenize("bin BLUE at Ж!") == unknown).sum() == 2


def test_units_that_are_white_space_are_read_as_they_are_written(tmp_path):
    """SentencePiece keeps some of Unicode's white space as letters."""
    units = train_tokenizer(["x\u0085y z", "xy z"] * 10, tmp_path / "t", vocab_size=8)
    assert "\u0085" in units
    paths = {"sp_model_path": f"{tmp_path}/t.model", "dict_path": f"{tmp_path}/t_units.txt"}
    assert TextTransform(**paths).token_list == ["<blank>", *units, "<eos>"]
    lines = (tmp_path / "t_units.txt").read_bytes()
    (tmp_path / "t_units.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    assert TextTransform(**paths).token_list == ["<blank>", *units, "<eos>"]


def test_byte_pieces_become_characters(tmp_path):
    """As SentencePiece decodes them."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc ab", "ab c"] * 10),
        model_prefix=str(tmp_path / "bytes"),
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    transform = TextTransform(sp_model_path=f"{tmp_path}/bytes.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=f"{tmp_path}/bytes.model")
    for text in ("ab ж", "日本 c", "abc", "é"):
        ids = transform.tokenize(text)
        assert transform.post_process(ids) == processor.decode(processor.encode(text)) == text
        assert transform.unknown(text) == []
        assert transform.normalize(text) == text
    half = transform.tokenize("ж")[:-1]
    assert transform.post_process(half) == processor.decode(processor.encode("ж")[:-1])
