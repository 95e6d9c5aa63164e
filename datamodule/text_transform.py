"""Translates between text and the token ids of a SentencePiece vocabulary."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch

BLANK = "<blank>"
UNKNOWN = "<unk>"
END = "<eos>"
WORD_BOUNDARY = "\u2581"
SEPARATOR = re.compile(r"[ \t]+")  # of a units file
BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")  # how models with byte fallback write other characters


class TextTransform:
    """SentencePiece pieces as token ids: 0 is the CTC blank, pieces follow, `<eos>` is last.

    Args:
        sp_model_path: SentencePiece model.
        dict_path: Units file with one `piece id` a line, ids from 1 on, `<unk>` among them. None
            takes `<unk>` and the pieces in the order of the SentencePiece model.

    Attributes:
        name: Folder and name of the SentencePiece model, for messages.
        token_list: All tokens, `<blank>` and `<eos>` included; the index is the id.
        prompt: Empty: nothing but `sos` comes before a text.
        special_tokens: Empty.

    Raises:
        ValueError: A file cannot be read.
        ValueError: The SentencePiece model is malformed.
        ValueError: The units file is malformed; the message names the line.
    """

    prompt: tuple[int, ...] = ()
    special_tokens: tuple[int, ...] = ()

    def __init__(self, *, sp_model_path: str, dict_path: str | None = None) -> None:
        self._processor = _load_processor(sp_model_path)
        self.name = "/".join(Path(sp_model_path).resolve().with_suffix("").parts[-2:])
        units = output_pieces(self._processor) if dict_path is None else _read_units(dict_path)
        self.token_list = [BLANK, *units, END]
        self._has_bytes = any(BYTES.fullmatch(piece) for piece in units)
        self._ids = {piece: index for index, piece in enumerate(units, start=1)}

    @property
    def odim(self) -> int:
        """Size of the vocabulary, `<blank>` and `<eos>` included."""
        return len(self.token_list)

    @property
    def sos(self) -> int:
        """Id that begins a decoder's input: the same as `eos`."""
        return self.odim - 1

    @property
    def eos(self) -> int:
        """Id that ends a decoder's output."""
        return self.odim - 1

    def normalize(self, text: str) -> str:
        """The text as the model writes it: SentencePiece's normalisation, which is NFKC mostly."""
        return self._processor.normalize(text).replace(WORD_BOUNDARY, " ").strip()

    def tokenize(self, text: str) -> torch.Tensor:
        """Turn text into ids, int64 (U,); pieces that are not in the vocabulary become `<unk>`."""
        unknown = self._ids[UNKNOWN]
        pieces = self._processor.encode(text, out_type=str)
        return torch.tensor([self._ids.get(piece, unknown) for piece in pieces], dtype=torch.int64)

    def unknown(self, text: str) -> list[str]:
        """List the parts of a text that become `<unk>`."""
        pieces = self._processor.encode(text, out_type=str)
        return [piece for piece in pieces if piece == UNKNOWN or piece not in self._ids]

    @property
    def takes_text(self) -> bool:
        """Whether text can be written at all: the units file may belong to another model."""
        unknown = self._processor.unk_id()
        return any(self._processor.piece_to_id(piece) != unknown for piece in self._ids)

    def post_process(self, ids: torch.Tensor | Iterable[int]) -> str:
        """Turn ids (U,) into text; padding (-1), blanks and `<eos>` are left out."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        pieces = (self.token_list[index] for index in ids if 0 < index < self.eos)
        text = "".join(pieces)
        if self._has_bytes:
            text = BYTES.sub(_decoded, text)
        return text.replace(WORD_BOUNDARY, " ").strip()


def _decoded(match: re.Match[str]) -> str:
    """The characters that byte pieces stand for."""
    return bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode(errors="replace")


def _load_processor(path: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        with open(path, "rb") as file:
            model = file.read()
        processor.LoadFromSerializedProto(model)
    except OSError as error:
        raise ValueError(f"{path}: cannot read the SentencePiece model: {error.strerror}") from None
    except RuntimeError:
        raise ValueError(f"{path}: not a SentencePiece model") from None
    return processor


def output_pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    """List `<unk>` and the model's pieces; `<s>`, `</s>` and padding are not output units."""
    ids = range(processor.get_piece_size())
    special = (processor.is_control, processor.is_unknown, processor.is_unused)
    return [UNKNOWN, *(processor.id_to_piece(i) for i in ids if not any(f(i) for f in special))]


def _read_units(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot read the units file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{os.fspath(path)}: the units file is not UTF-8 text") from None
    units = []
    for number, line in enumerate(lines, start=1):
        line = line.strip(" \t")  # Other white space may be a piece.
        if not line:
            continue
        words = SEPARATOR.split(line)
        if len(words) != 2 or words[1] != str(len(units) + 1):
            raise ValueError(
                f"{path}, line {number}: got {line!r}, expected 'piece {len(units) + 1}'"
            )
        units.append(words[0])
    if UNKNOWN not in units:
        raise ValueError(f"{path}: the units file has no {UNKNOWN}, expected 'piece id' lines")
    return units
