"""Tests the tokenizer trainer: units file, seeds, determinism, and what it refuses."""

import hashlib

import pytest
import sentencepiece

from datamodule.label_list import LabelList
from datamodule.train_tokenizer import (
    main,
    read_label_sentences,
    read_sentences,
    train_tokenizer,
)

SENTENCES = [
    "bin blue at a zero again",
    "lay green by b one now",
    "bin green at b one again",
    "lay blue by a zero now",
    "set red with q three please",
    "place white in x seven soon",
]
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})
WHOLE_WORDS = {
    "vocab_size": len(WORDS) + len(set("".join(WORDS)) | {"▁"}) + 3,
    "seed_pieces": ["▁" + word for word in WORDS],
}


def processor_of(prefix):
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_units_number_the_pieces_of_the_model(tmp_path, model_type):
    prefix = tmp_path / "new" / "tokens"
    units = train_tokenizer(SENTENCES, prefix, vocab_size=30, model_type=model_type)
    lines = (tmp_path / "new" / "tokens_units.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{piece} {index}" for piece, index in units.items()]
    assert lines[0] == "<unk> 1"
    assert list(units.values()) == list(range(1, 29))
    processor = processor_of(prefix)
    pieces = {processor.id_to_piece(index) for index in range(processor.get_piece_size())}
    assert set(units) == pieces - {"<s>", "</s>"}
    for sentence in SENTENCES:
        assert all(piece in units for piece in processor.encode(sentence, out_type=str))


def test_seed_pieces_stay_whole(tmp_path):
    train_tokenizer(SENTENCES, tmp_path / "t", **WHOLE_WORDS)
    processor = processor_of(tmp_path / "t")
    for sentence in SENTENCES:
        pieces = processor.encode(sentence, out_type=str)
        assert pieces == ["▁" + word for word in sentence.split()]
    assert processor.decode(processor.encode("green again")) == "green again"
    assert processor.encode("▁bla", out_type=str) == ["▁b", "l", "a"]


def test_equal_input_gives_equal_bytes(tmp_path):
    digests = []
    for name in ("one", "two"):
        train_tokenizer(SENTENCES, tmp_path / name / "t", **WHOLE_WORDS)
        files = sorted((tmp_path / name).iterdir())
        assert [file.name for file in files] == ["t.model", "t_units.txt"]
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("sentences", "options", "message"),
    [
        (["", "  "], {}, "no text"),
        (SENTENCES, {"vocab_size": 5000}, r"vocabulary of 5000: .*too high"),
        (SENTENCES, {"vocab_size": 4}, r"vocabulary of 4: "),
        (SENTENCES, {"vocab_size": 0}, r"vocabulary of 0: "),
        (SENTENCES, {"model_type": "word"}, "expected one of unigram, bpe"),
        (SENTENCES, {"model_type": "bpe", "seed_pieces": ["▁a"]}, "only unigram"),
    ],
)
def test_refuses(tmp_path, sentences, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_tokenizer(sentences, tmp_path / "t", **{"vocab_size": 30, **options})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_text_files_are_read_line_by_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("héllo\r\n\n  two words \n".encode())
    assert read_sentences([file, file]) == ["héllo", "two words"] * 2


def test_label_text_may_hold_commas(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("d,a/b.mp4,12,yes, it is, 1 2\n\nd,a/c.mp4,9,1984\n", encoding="utf-8")
    assert read_label_sentences([file]) == ["yes, it is, 1 2", "1984"]


def test_lists_are_read_as_in_training(tmp_path):
    file = tmp_path / "train.csv"
    rows = ['d,a.mp4,1,"well, you"', "d,b.mp4,2,one\u2028two", "", "d,c.mp4,3,3 4"]
    file.write_bytes("\r".join(["\ufeff" + rows[0], *rows[1:]]).encode())
    labels = LabelList("", str(file))
    expected = ["well, you", "one\u2028two", "3 4"]
    assert [labels.text(index) for index in range(len(labels))] == expected
    assert read_label_sentences([file]) == expected
    file.write_text("d,a.mp4,1,word\u2028word\nd,b.mp4,none,word\n", encoding="utf-8")
    for read in (lambda: read_label_sentences([file]), lambda: LabelList("", str(file))):
        with pytest.raises(ValueError, match=r"train.csv, line 2: got 'd,b.mp4,none,word'"):
            read()


def test_text_files_end_lines_as_lists_do(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\u2028two\rthree\u0085four\r\n".encode())
    assert read_sentences([file]) == ["one\u2028two", "three\u0085four"]


def test_transcripts_in_digits_are_told_from_ids_by_an_option(tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text("d,a.mp4,12,3 4 5\nd,b.mp4,9,7\n", encoding="utf-8")
    assert read_label_sentences([file], "text") == ["3 4 5", "7"]
    command = ["--labels", str(file), "--vocab-size", "8", "--output", str(tmp_path / "t")]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "--label-format text" in capsys.readouterr().err
    assert main([*command, "--label-format", "text"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"d,a.mp4,12,3 4 5\nd,b.mp4,9,7\n", "token ids, expected plain text"),
        (b"d,a.mp4,12,words\nd,b.mp4,9\n", "line 2: got 'd,b.mp4,9', expected 'dataset"),
        (b"d,a.mp4,12\nd,b.mp4,9\n", "the rows have no last field"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "cannot read the label list: No such file"),
    ],
)
def test_command_line_refuses_lists_in_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "list.csv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_label_sentences([file])
    output = tmp_path / "out" / "t"
    command = ["--labels", str(file), "--vocab-size", "30", "--output", str(output)]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(file) in error
    assert not output.parent.exists()


def test_command_line_writes_both_files(tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES), encoding="utf-8")
    labels = tmp_path / "labels.csv"
    rows = [f"d,x.mp4,10,{sentence}\n" for sentence in SENTENCES]
    labels.write_text("".join(rows), encoding="utf-8")
    for source in (["--text", str(text)], ["--labels", str(labels)]):
        prefix = tmp_path / source[0].strip("-")
        assert main([*source, "--vocab-size", "30", "--output", str(prefix)]) == 0
        captured = capfd.readouterr()
        assert captured.out == f"{prefix}.model and {prefix}_units.txt: 28 units\n"
        assert captured.err == ""
    assert (tmp_path / "text.model").read_bytes() == (tmp_path / "labels.model").read_bytes()
