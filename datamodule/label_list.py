"""Reads label lists, of millions of rows too, into a few flat arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np

CHUNK_BYTES = 4 << 20  # what is parsed at a time; bounds the memory of the intermediate arrays
CHUNK_ROWS = 1 << 16  # likewise, where rows are gone through one by one
MAX_DIGITS = 9
ROW = "'dataset,relative/path.mp4,number_of_frames,token ids or text'"

COMMA, NEWLINE, ZERO = (ord(character) for character in ",\n0")
IS_SPACE = np.isin(np.arange(256), [ord(character) for character in " \t\r\n"])

# Fields as a CSV writer quotes them: the three first of a row, which hold no comma, and the last.
QUOTED_FIRST = re.compile(
    rb'^("?)([^",\n]*)\1,("?)([^",\n]*)\3,("?)([^",\n]*)\5(?=,|$)', re.MULTILINE
)
QUOTED_LAST = re.compile(rb'^((?:[^,\n]*,){3})[ \t]*"((?:[^"\n]|"")*)"[ \t]*$', re.MULTILINE)


class LabelList:
    """The rows `dataset,relative/path.mp4,number_of_frames,token ids or text` of one file.

    All rows may leave the last field out, with its comma: a list for decoding only. A last field
    that is empty is the transcript of silence.

    Rows end with LF, CR LF or CR, as in Python's text files; other line separators of Unicode are
    part of the text. Fields that are quoted as in CSV lose their quotes. What kind the last fields
    are of, `label_format.holds_ids` tells.

    The file's bytes and the positions of the fields are kept instead of Python objects: processes
    that are forked from this one share them.

    Args:
        root_dir: Folder that holds `labels/` and the datasets.
        file: Path of the list, under `root_dir/labels/` unless absolute.

    Attributes:
        file: Path of the list.
        num_frames: int32 (N,), number of video frames of each utterance.
        is_text: bool (N,), whether the last field is something else than whole numbers separated
            by spaces; an empty one is not.
        is_empty: bool (N,), whether there is nothing in the last field.
        has_labels: Whether the rows have a last field.

    Raises:
        ValueError: The file cannot be read.
        ValueError: The file is empty.
        ValueError: A row is malformed; the message names the file and the line.
    """

    def __init__(self, root_dir: str, file: str) -> None:
        self.root_dir = root_dir
        self.file = os.path.join(root_dir, "labels", file)
        try:
            with open(self.file, "rb") as stream:
                self._data = _plain(stream.read())
        except OSError as error:
            raise ValueError(f"{self.file}: cannot read the label list: {error.strerror}") from None
        self._position_type = np.uint32 if len(self._data) < 1 << 32 else np.int64
        parts = []
        num_lines = 0
        for begin, end in _chunks(self._data):
            parts.append(self._parse(begin, end, num_lines))
            num_lines += self._data.count(b"\n", begin, end)
        if not any(len(part[0]) for part in parts):
            raise ValueError(f"{self.file}: the label list is empty, expected one row an utterance")
        self._bounds, self._lines, self.num_frames, self.is_text, self.is_empty = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        has_labels = self._bounds[:, 3] < self._bounds[:, 4]
        self.has_labels = bool(has_labels.any())
        if self.has_labels and not has_labels.all():
            row = int(np.argmin(has_labels))
            raise ValueError(
                f"{self.where(row)}: got {shorten(self._text(*self._bounds[row, [0, 4]]))}, "
                f"expected {ROW} like other rows of this list: a comma must follow the number of "
                "frames, also where the transcript is empty"
            )

    def __len__(self) -> int:
        return len(self.num_frames)

    def where(self, index: int) -> str:
        """Name the row in messages: file and line."""
        return f"{self.file}, line {self._lines[index]}"

    def utterance_id(self, index: int) -> str:
        """Return `dataset/relative/path` without the suffix."""
        return os.path.splitext(self._path_below_root(index))[0]

    def path(self, index: int) -> str:
        """Return the path of the utterance's video file."""
        return os.path.join(self.root_dir, self._path_below_root(index))

    def _path_below_root(self, index: int) -> str:
        start, first, second, _, _ = self._bounds[index]
        return os.path.join(self._text(start, first), self._text(first + 1, second))

    def text(self, index: int) -> str:
        """Return the last field as it stands."""
        _, _, _, third, end = self._bounds[index]
        return self._text(third + 1, end).strip()

    def token_ids(self, index: int) -> list[int]:
        """Return the last field of a row that holds token ids."""
        return [int(word) for word in self.text(index).split()]

    def folders(self) -> Iterator[tuple[str, np.ndarray, list[str]]]:
        """Go through the list folder by folder.

        Yields:
            A folder; the indices of the utterances whose videos are in it, ascending (n,); the
            names of these files.
        """
        numbers: dict[bytes, int] = {}  # of the folders
        folder_of = np.empty(len(self), np.int32)
        cuts = np.empty(len(self), self._bounds.dtype)  # where folders end: at "/" or at a comma
        for begin in range(0, len(self), CHUNK_ROWS):
            columns = self._bounds[begin : begin + CHUNK_ROWS, :3].T.tolist()
            for index, (start, first, second) in enumerate(zip(*columns, strict=True), begin):
                cut = max(first, self._data.rfind(b"/", first, second))
                folder_of[index] = numbers.setdefault(self._data[start:cut], len(numbers))
                cuts[index] = cut
        order = np.argsort(folder_of, kind="stable")
        ends = np.cumsum(np.bincount(folder_of, minlength=len(numbers)))
        for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            indices = order[begin:end]
            places = zip(cuts[indices].tolist(), self._bounds[indices, 2].tolist(), strict=True)
            names = [self._text(cut + 1, after) for cut, after in places]
            yield os.path.dirname(self.path(indices[0])), indices, names

    def longer_than(self, max_frames: int) -> np.ndarray:
        """Return the indices of the utterances with more than `max_frames` frames."""
        return np.flatnonzero(self.num_frames > max_frames)

    def check_token_ids(self, largest: int) -> None:
        """Check that all token ids lie within 1 and `largest`.

        Raises:
            ValueError: One does not; the message names file, line and id.
        """
        rows_per_chunk = max(1, CHUNK_BYTES * len(self) // len(self._data))
        for begin in range(0, len(self), rows_per_chunk):
            bounds = self._bounds[begin : begin + rows_per_chunk].astype(np.int64)
            offset = bounds[0, 0]
            chunk = np.frombuffer(self._data, np.uint8, bounds[-1, 4] - offset, offset)
            edges = np.zeros(len(chunk) + 1, np.int8)  # +1 where a last field begins, -1 after it
            edges[bounds[:, 3] + 1 - offset] += 1
            edges[bounds[:, 4] - offset] -= 1
            in_word = _is_digit(chunk) & np.cumsum(edges[:-1], dtype=np.int8).astype(bool)
            changes = np.flatnonzero(np.diff(in_word, prepend=False, append=False))
            starts, ends = changes[::2], changes[1::2]
            ids = _numbers(chunk, starts, ends)
            wrong = np.flatnonzero((ids < 1) | (ids > largest))
            if len(wrong):
                start, end = starts[wrong[0]] + offset, ends[wrong[0]] + offset
                row = begin + np.searchsorted(bounds[:, 0], start, side="right") - 1
                raise ValueError(
                    f"{self.where(row)}: token id {self._text(start, end)} is outside the "
                    f"vocabulary, expected 1 to {largest}; was the list made with another one? If "
                    "it holds transcripts in digits, give --label-format text"
                )

    def _text(self, start: int, end: int) -> str:
        return self._data[start:end].decode()

    def _parse(self, begin: int, end: int, num_lines: int) -> tuple[np.ndarray, ...]:
        """Parse the whole lines in the bytes [begin, end), which follow `num_lines` others.

        Returns:
            For each row that is not blank: its start, its first three commas, the third of which
            may be its end, and its end (N, 5); its line number (N,); its number of frames (N,);
            whether its last field is text (N,), and whether it is empty (N,).
        """
        self._check_encoding(begin, end, num_lines)
        chunk = np.frombuffer(self._data, np.uint8, end - begin, begin)
        ends = np.flatnonzero(chunk == NEWLINE)
        if chunk[-1] != NEWLINE:
            ends = np.append(ends, len(chunk))
        starts = np.append(0, ends[:-1] + 1)
        lines = np.arange(num_lines + 1, num_lines + len(ends) + 1, dtype=np.int32)
        solid = _running_count(~IS_SPACE[chunk])
        filled = solid[ends] > solid[starts]
        starts, ends, lines = starts[filled], ends[filled], lines[filled]

        commas = np.append(np.flatnonzero(chunk == COMMA), [len(chunk)] * 3)
        commas = commas[np.searchsorted(commas, starts)[:, None] + np.arange(3)]  # (N, 3)
        self._refuse(commas[:, 1] >= ends, begin, starts, ends, lines)
        commas[:, 2] = np.minimum(commas[:, 2], ends)
        num_frames = _numbers(chunk, commas[:, 1] + 1, commas[:, 2])
        malformed = (num_frames < 1) | (commas[:, 1] == commas[:, 0] + 1)
        self._refuse(malformed, begin, starts, ends, lines)

        labels = np.minimum(commas[:, 2] + 1, ends)  # where the last fields begin
        num_solid = solid[ends] - solid[labels]
        digits = _running_count(_is_digit(chunk))
        is_text = digits[ends] - digits[labels] < num_solid
        bounds = np.column_stack([starts, commas, ends]) + begin
        return bounds.astype(self._position_type), lines, num_frames, is_text, num_solid == 0

    def _refuse(
        self,
        malformed: np.ndarray,
        begin: int,
        starts: np.ndarray,
        ends: np.ndarray,
        lines: np.ndarray,
    ) -> None:
        if malformed.any():
            row = np.argmax(malformed)
            got = shorten(self._text(starts[row] + begin, ends[row] + begin))
            raise ValueError(f"{self.file}, line {lines[row]}: got {got}, expected {ROW}")

    def _check_encoding(self, begin: int, end: int, num_lines: int) -> None:
        try:
            self._data[begin:end].decode()
        except UnicodeDecodeError as error:
            line = num_lines + 1 + self._data.count(b"\n", begin, begin + error.start)
            raise ValueError(f"{self.file}, line {line}: not UTF-8 text") from None


def _plain(data: bytes) -> bytes:
    """Give rows one line end, and fields no quotes."""
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b'"' in data:
        data = QUOTED_FIRST.sub(rb"\2,\4,\6", data)
        data = QUOTED_LAST.sub(lambda row: row[1] + row[2].replace(b'""', b'"'), data)
    return data


def _chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Cut a text into ranges of whole lines of about `CHUNK_BYTES`."""
    begin = len(b"\xef\xbb\xbf") if data.startswith(b"\xef\xbb\xbf") else 0  # byte order mark
    while begin < len(data):
        end = data.find(b"\n", begin + CHUNK_BYTES) + 1 or len(data)
        yield begin, end
        begin = end


def _running_count(flags: np.ndarray) -> np.ndarray:
    """Count the flags that are set before each position: (N,) -> int32 (N + 1,)."""
    counts = np.zeros(len(flags) + 1, np.int32)
    np.cumsum(flags, dtype=np.int32, out=counts[1:])
    return counts


def _is_digit(characters: np.ndarray) -> np.ndarray:
    """Tell which characters are 0 to 9: uint8 (N,) -> bool (N,)."""
    return characters - np.uint8(ZERO) < 10  # What comes before "0" wraps around.


def _numbers(text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Read the decimal numbers in the ranges [start, end): int32 (N,), -1 where it is not one."""
    sizes = ends - starts
    values = np.zeros(len(sizes), np.int32)
    is_number = (sizes > 0) & (sizes <= MAX_DIGITS)
    for place in range(min(MAX_DIGITS, int(sizes.max(initial=0)))):
        inside = place < sizes
        characters = text[np.maximum(ends - 1 - place, 0)]
        is_number &= _is_digit(characters) | ~inside
        values += (characters - np.uint8(ZERO)) * inside * np.int32(10**place)
    return np.where(is_number, values, np.int32(-1))


def shorten(text: str, limit: int = 80) -> str:
    """Quote a text in a message, cut off where it is long."""
    text = text.strip()
    return repr(text if len(text) <= limit else text[:limit] + "...")
