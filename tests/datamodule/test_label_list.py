"""Tests of datamodule/label_list.py."""

import csv
import io

import pytest

from datamodule import label_list
from datamodule.label_list import LabelList


@pytest.fixture
def write(tmp_path):
    def write_list(text, name="a.csv"):
        (tmp_path / "labels").mkdir(exist_ok=True)
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "labels" / name).write_bytes(data)
        return LabelList(str(tmp_path), name)

    return write_list


def test_rows_of_token_ids(write, tmp_path):
    labels = write("lrs3,a/b.mp4,25,1 2 30\nlrs2,c d.mp4,100,4\n")
    assert len(labels) == 2
    assert not labels.is_text.any()
    assert labels.num_frames.tolist() == [25, 100]
    assert [labels.token_ids(index) for index in range(2)] == [[1, 2, 30], [4]]
    assert labels.path(0) == str(tmp_path / "lrs3" / "a" / "b.mp4")
    assert labels.path(1) == str(tmp_path / "lrs2" / "c d.mp4")
    assert labels.utterance_id(0) == "lrs3/a/b"
    assert labels.where(1) == f"{tmp_path}/labels/a.csv, line 2"
    assert labels.longer_than(25).tolist() == [1]


def test_rows_of_text_may_hold_commas_and_numbers(write):
    labels = write("s,a.mp4,25,well, hello, you\ns,b.mp4,3,1984\ns,c.mp4,3,grüße\n")
    assert labels.is_text.tolist() == [True, False, True]
    assert [labels.text(index) for index in range(3)] == ["well, hello, you", "1984", "grüße"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_blank_lines_and_byte_order_mark(write, end, last):
    text = "\ufeff" + end.join(["s,a.mp4,25,1 2", "", "  ", "s,b.mp4,3,3 "]) + (end if last else "")
    labels = write(text)
    assert not labels.is_text.any()
    assert [labels.token_ids(index) for index in range(2)] == [[1, 2], [3]]
    assert labels.utterance_id(0) == "s/a"
    assert labels.where(1).endswith("line 4")


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_rows_for_decoding_have_no_last_field(write, end):
    labels = write("s,a.mp4,25\n\ns,b.mp4,3" + end)
    assert not labels.has_labels
    assert labels.num_frames.tolist() == [25, 3]
    assert [labels.text(index) for index in range(2)] == ["", ""]
    assert labels.path(1).endswith("/s/b.mp4")
    assert write('"s","a.mp4","25"\n').num_frames.tolist() == [25]


@pytest.mark.parametrize("empty", ["", " ", '""'])
def test_an_empty_last_field_is_silence(write, empty):
    labels = write(f"s,a.mp4,25,1 2\ns,b.mp4,3,{empty}\ns,c.mp4,3,{empty}")
    assert labels.has_labels
    assert labels.is_empty.tolist() == [False, True, True]
    assert not labels.is_text.any()
    labels.check_token_ids(2)
    assert [labels.token_ids(index) for index in range(3)] == [[1, 2], [], []]
    assert labels.text(2) == ""


def test_separators_of_unicode_are_text(write):
    labels = write("s,a.mp4,25,one\u2028two\x0bthree\u0085\ns,b.mp4,3,four\n")
    assert [labels.text(index) for index in range(2)] == ["one\u2028two\x0bthree", "four"]
    assert labels.where(1).endswith("line 2")


def test_rows_of_a_csv_writer(write):
    """What Python's csv module writes is read as it reads it."""
    texts = ["well, you", 'the "end"', '"all"', "plain", 'a "b" c, d', "2 3", '""']
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        file = io.StringIO()
        rows = [["s", f"a/{n}.mp4", n + 1, text] for n, text in enumerate(texts)]
        csv.writer(file, quoting=quoting).writerows(rows)
        labels = write(file.getvalue())
        assert [labels.text(index) for index in range(len(rows))] == texts
        assert [labels.utterance_id(n) for n in range(len(rows))] == [f"s/a/{n}" for n in range(7)]
        assert labels.num_frames.tolist() == [row[2] for row in rows]
        assert labels.is_text.tolist() == [text != "2 3" for text in texts]


def test_quotes_that_no_csv_writer_makes_are_text(write):
    texts = ['"yes" he said "no"', 'open "', '"open', 'a "b"', '"yes", he said']
    labels = write("".join(f"s,a.mp4,25,{text}\n" for text in texts))
    assert [labels.text(index) for index in range(len(texts))] == texts


@pytest.mark.parametrize("holds_ids", [True, False])
def test_long_lists_are_read_in_pieces(write, monkeypatch, holds_ids):
    monkeypatch.setattr(label_list, "CHUNK_BYTES", 64)
    words = ["1 2", "3 4 5"] if holds_ids else ["a, b", "c"]
    rows = [(f"set,clip{n}.mp4", n + 1, words[n % 2]) for n in range(100)]
    labels = write("".join(f"{name},{frames},{text}\n" for name, frames, text in rows))
    assert labels.is_text.all() != holds_ids
    assert labels.num_frames.tolist() == [row[1] for row in rows]
    assert [labels.text(index) for index in range(100)] == [row[2] for row in rows]
    assert [labels.utterance_id(index) for index in range(100)] == [
        f"set/clip{n}" for n in range(100)
    ]
    assert [labels.where(index).rsplit(" ", 1)[1] for index in range(100)] == [
        str(n + 1) for n in range(100)
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("s,b.mp4", "line 3: got 's,b.mp4', expected 'dataset,"),
        ("s,b.mp4,", "line 3: got 's,b.mp4,'"),
        ("s,b.mp4,x", "line 3: got 's,b.mp4,x'"),
        ("s,b.mp4,x,1", "line 3: got 's,b.mp4,x,1'"),
        ("s,b.mp4,0,1", "line 3: got"),
        ("s,b.mp4,-5,1", "line 3: got"),
        ("s,b.mp4,2.5,1", "line 3: got"),
        ("s,b.mp4,,1", "line 3: got"),
        ("s,b.mp4,1234567890,1", "line 3: got"),
        ("s,,25,1", "line 3: got"),
        ("s,b.mp4,25", "line 3: got 's,b.mp4,25', expected 'dataset,.* a comma must follow"),
        (b"s,b.mp4,25,\xff", "line 3: not UTF-8"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [8, 1 << 20])
def test_malformed_rows(write, monkeypatch, row, message, chunk_bytes):
    monkeypatch.setattr(label_list, "CHUNK_BYTES", chunk_bytes)
    row = row if isinstance(row, bytes) else row.encode()
    with pytest.raises(ValueError, match=message) as error:
        write(b"s,a.mp4,25,1 2\n\n" + row + b"\ns,c.mp4,25,1 2\n")
    assert "labels/a.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_empty_lists(write, tmp_path):
    with pytest.raises(ValueError, match=r"labels/none.csv: cannot read the label list: No such"):
        LabelList(str(tmp_path), "none.csv")
    for text in ("", "\n \n"):
        with pytest.raises(ValueError, match="the label list is empty"):
            write(text)


@pytest.mark.parametrize("chunk_bytes", [8, 1 << 20])
@pytest.mark.parametrize("wrong", ["0", "41", "99999999999999999999"])
def test_token_ids_outside_the_vocabulary(write, monkeypatch, chunk_bytes, wrong):
    monkeypatch.setattr(label_list, "CHUNK_BYTES", chunk_bytes)
    labels = write(f"s,a1.mp4,25,1 2\ns,b1.mp4,50,3 {wrong} 40\ns,c1.mp4,75,5\n")
    with pytest.raises(ValueError, match=rf"a.csv, line 2: token id {wrong} is .* 1 to 40"):
        labels.check_token_ids(40)


def test_token_ids_within_the_vocabulary(write):
    write("s,100.mp4,999,1 2\ns,b,1000,40").check_token_ids(40)


@pytest.mark.parametrize("chunk_rows", [1, 3, 1 << 16])
def test_rows_by_folder(write, tmp_path, monkeypatch, chunk_rows):
    monkeypatch.setattr(label_list, "CHUNK_ROWS", chunk_rows)
    paths = ["a/1.mp4", "b/1.mp4", "ü.mp4", "a/2 b.mp4", "a/c/1.mp4", "/abs/1.mp4", "b/2.mp4"]
    labels = write("".join(f"s/t,{path},25,a/b\n" for path in paths))
    found = {}
    for folder, indices, names in labels.folders():
        found[folder] = list(zip(indices.tolist(), names, strict=True))
    root = f"{tmp_path}/s/t"
    assert found == {
        f"{root}/a": [(0, "1.mp4"), (3, "2 b.mp4")],
        f"{root}/b": [(1, "1.mp4"), (6, "2.mp4")],
        root: [(2, "ü.mp4")],
        f"{root}/a/c": [(4, "1.mp4")],
        "/abs": [(5, "1.mp4")],
    }
    for folder, rows in found.items():
        assert [f"{folder}/{name}" for _, name in rows] == [labels.path(row) for row, _ in rows]
