"""Translates between text and the token ids of a pretrained decoder's own vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from datamodule.text_transform import BLANK, WORD_BOUNDARY
from espnet.nets.decoders import CAUSAL_LM_TYPES, DECODERS
from espnet.nets.encoders import folder_problem, type_problem

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FLAG = "--decoder-name"
TEXT_CASES = ("keep", "lower")
TASKS = ("transcribe", "translate")
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
BYTE_LEVEL_SPACE = "\u0120"  # how byte-level tokenizers write a space
CONTROL = re.compile(r"<\|.*\|>")
LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
WHISPER_START, WHISPER_END = "<|startoftranscript|>", "<|endoftext|>"
NO_TIMESTAMPS = "<|notimestamps|>"
ENGLISH_ONLY_ROWS = 51864  # of the output layer of the published English-only Whisper checkpoints
SHOWN = 5  # alternatives that an error names


class PretrainedTextTransform:
    """A pretrained tokenizer's tokens as token ids: 0 is the CTC blank, token i has id i + 1.

    The factories `llama_text_transform` and `whisper_text_transform` know the rest of a checkpoint.

    Args:
        tokenizer: Tokenizer of transformers.
        num_rows: Rows of the decoder's output layer. Where the tokenizer has fewer tokens, names
            such as `<unused_7>`, with the number of the row, fill up `token_list`.
        prompt: Ids of the tokenizer that come before the text, at least one.
        eos: Id of the tokenizer that ends the text.
        space_before_text: Whether a space comes before the text, as where it follows a prompt.
        text_case: `keep`, or `lower` for text that is put in lower case first.

    Attributes:
        name: What messages call it.
        takes_text: True: it does not only know ids.
        token_list: All tokens as the tokenizer writes them, `<blank>` first; the index is the id.
        prompt: As above, not shifted.
        special_tokens: Ids of the tokenizer that are no text, unused rows among them and `eos` not:
            a search must never choose them.

    Raises:
        ValueError: The case is unknown.
        ValueError: The prompt is empty, or it, `eos` or a token of text has no row.
    """

    name = "the decoder's own vocabulary"
    takes_text = True

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        num_rows: int,
        prompt: tuple[int, ...],
        eos: int,
        space_before_text: bool,
        text_case: str,
    ) -> None:
        if text_case not in TEXT_CASES:
            raise ValueError(f"got text case {text_case!r}, expected {' or '.join(TEXT_CASES)}")
        if not prompt:
            raise ValueError("got an empty prompt, expected at least the token that begins text")
        tokens = {index: token for token, index in tokenizer.get_vocab().items()}
        control = _control_ids(tokenizer)
        if outside := [i for i in {*prompt, eos, *(tokens.keys() - control)} if i >= num_rows]:
            raise ValueError(
                f"the tokenizer has token {tokens[max(outside)]!r} with id {max(outside)}, but the "
                f"output layer has {num_rows} rows: give a checkpoint with the tokenizer that it "
                "was trained with"
            )
        names = [tokens.get(index, f"<unused_{index}>") for index in range(num_rows)]
        no_text = control | (set(range(num_rows)) - tokens.keys())
        self.token_list = [BLANK, *names]
        self.prompt = tuple(prompt)
        self.special_tokens = tuple(sorted(i for i in no_text if i != eos and i < num_rows))
        self._eos = eos
        self._no_text = frozenset({*no_text, eos})
        self._tokenizer = tokenizer
        self._before = " " if space_before_text and not _adds_space(tokenizer) else ""
        self._lower = text_case == "lower"

    @property
    def odim(self) -> int:
        """Size of the vocabulary, `<blank>` included: 1 + rows of the output layer."""
        return len(self.token_list)

    @property
    def sos(self) -> int:
        """Id that begins a decoder's input: the last of the prompt."""
        return self.prompt[-1] + 1

    @property
    def eos(self) -> int:
        """Id that ends a decoder's output."""
        return self._eos + 1

    def normalize(self, text: str) -> str:
        """The text as the model writes it: in its case, and in the form of its characters."""
        text = self._in_case(text)
        written = self.post_process(self.tokenize(text))
        # What the tokenizer cannot write stays, and counts as an error.
        return written if _in_one_form(written) == _in_one_form(text) else text

    def tokenize(self, text: str) -> torch.Tensor:
        """Turn text into ids, int64 (U,), without special tokens; white space around it is cut off.

        Text that looks like a special token is spelled like any other.
        """
        text = self._in_case(text.strip())
        if not text:
            return torch.empty(0, dtype=torch.int64)
        return torch.tensor(_encode(self._tokenizer, self._before + text), dtype=torch.int64) + 1

    def unknown(self, text: str) -> list[str]:
        """List the characters of a text that are lost, or have no token of their own."""
        text = self._in_case(text)
        if self._is_known(text):
            return []
        lost = {character for character in set(text) if not self._is_known(character)}
        return [character for character in text if character in lost]

    def post_process(self, ids: torch.Tensor | Iterable[int]) -> str:
        """Turn ids (U,) into text; padding (-1), blanks and special tokens are left out."""
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        kept = [index - 1 for index in ids if index > 0 and index - 1 not in self._no_text]
        if not kept:
            return ""
        return self._tokenizer.decode(kept, clean_up_tokenization_spaces=False).strip()

    def _is_known(self, text: str) -> bool:
        ids = self.tokenize(text)
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and bool((ids == unknown + 1).any()):
            return False
        return _in_one_form(self.post_process(ids)) == _in_one_form(text)

    def _in_case(self, text: str) -> str:
        return text.lower() if self._lower else text


def llama_text_transform(
    name: str, *, prompt: str | None, text_case: str
) -> PretrainedTextTransform:
    """Load the vocabulary of a causal language model that `--decoder llama` takes.

    A tokenizer without BOS, as Qwen's, gets a stand-in for it: the token that the checkpoint's
    config names to begin, which in Qwen's training separated documents, else EOS.

    Args:
        name: Hub id, or a folder with config.json and tokenizer files.
        prompt: What comes before the text, after the token that begins a document; None for that
            token alone. Special tokens may be written out in it. A space separates it from the
            text, unless it ends with white space.
        text_case: `keep` or `lower`.

    Raises:
        ValueError: The tokenizer cannot be loaded, or is of another architecture.
        ValueError: It has no token that ends a text.
        ValueError: The case is unknown, or the tokenizer has more tokens than the output layer.
    """
    tokenizer, config = _load(name, CAUSAL_LM_TYPES)
    if (end := tokenizer.eos_token_id) is None:
        raise ValueError(
            f"{FLAG} {name} has a tokenizer without eos_token, one that ends a text is expected: "
            "give a checkpoint whose tokenizer_config.json names it"
        )
    begin = tokenizer.bos_token_id
    if begin is None:
        named = config.bos_token_id
        begin = named if named in _control_ids(tokenizer) else end
    ids = tokenizer.encode(prompt, add_special_tokens=False) if prompt else []
    return PretrainedTextTransform(
        tokenizer=tokenizer,
        num_rows=config.vocab_size,
        prompt=tuple(ids if ids[:1] == [begin] else [begin, *ids]),
        eos=end,
        space_before_text=bool(prompt) and not prompt[-1].isspace(),
        text_case=text_case,
    )


def whisper_text_transform(
    name: str, *, language: str | None, task: str, text_case: str
) -> PretrainedTextTransform:
    """Load the vocabulary of a Whisper checkpoint.

    Whisper writes a space before the first word, so text gets one too.

    Args:
        name: Hub id, or a folder with config.json and tokenizer files.
        language: Code such as `en`; None for English. English-only checkpoints know no other.
        task: `transcribe`, or `translate` into English; English-only checkpoints only transcribe.
        text_case: `keep` or `lower`.

    Raises:
        ValueError: The tokenizer cannot be loaded, or is of another architecture.
        ValueError: It lacks Whisper's special tokens.
        ValueError: The language or task is unknown to the checkpoint.
        ValueError: The case is unknown, or the tokenizer has more tokens than the output layer.
    """
    if task not in TASKS:
        raise ValueError(f"got task {task!r}, expected {' or '.join(TASKS)}")
    tokenizer, config = _load(name, DECODERS["whisper"].model_types)
    ids = tokenizer.get_vocab()
    languages = sorted(match[1] for match in map(LANGUAGE.fullmatch, ids) if match)
    if languages and _is_multilingual(name, config.vocab_size):
        code = language or "en"
        if code not in languages:
            raise ValueError(
                f"{FLAG} {name} knows no language {code!r}, expected one of {_some(languages)}"
            )
        prompt = [WHISPER_START, f"<|{code}|>", f"<|{task}|>", NO_TIMESTAMPS]
    else:
        if language not in (None, "en") or task != "transcribe":
            raise ValueError(
                f"{FLAG} {name} is English-only, got language {language!r} and task {task!r}: "
                "expected 'en' and 'transcribe', or give a multilingual checkpoint"
            )
        prompt = [WHISPER_START, NO_TIMESTAMPS]
    if missing := [token for token in (*prompt, WHISPER_END) if token not in ids]:
        raise ValueError(
            f"{FLAG} {name} has a tokenizer without {', '.join(missing)}: give the folder or hub "
            "id of a Whisper checkpoint"
        )
    return PretrainedTextTransform(
        tokenizer=tokenizer,
        num_rows=config.vocab_size,
        prompt=tuple(ids[token] for token in prompt),
        eos=ids[WHISPER_END],
        space_before_text=True,
        text_case=text_case,
    )


def _load(
    name: str, model_types: tuple[str, ...]
) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Load the tokenizer and the config of a checkpoint."""
    if problem := folder_problem(FLAG, name, model_types) or _files_problem(name):
        raise ValueError(problem)
    # Imported here, so that models without a pretrained decoder do without transformers.
    from transformers import AutoConfig, AutoTokenizer

    from espnet.nets.pytorch_backend.pretrained import loading_problem

    remedy = f"give {FLAG} a folder with tokenizer files or the hub id of a {model_types[0]} model"
    try:
        config = AutoConfig.from_pretrained(name)
        found = config.model_type
        tokenizer = AutoTokenizer.from_pretrained(name) if found in model_types else None
    except Exception as error:  # The tokenizers library raises plain exceptions.
        raise ValueError(f"{FLAG} {name} {loading_problem(error)}: {remedy}") from None
    if tokenizer is None:
        raise ValueError(f"{FLAG} {name} {type_problem(found, model_types)}: {remedy}")
    return tokenizer, config


def _files_problem(name: str) -> str | None:
    """What is wrong with a folder that has no tokenizer; transformers may make up an empty one."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    if any(all((folder / file).is_file() for file in files) for files in TOKENIZER_FILES):
        return None
    expected = ", ".join(" with ".join(files) for files in TOKENIZER_FILES)
    return (
        f"{FLAG} {name} has no tokenizer, looked for {expected}: give a folder with tokenizer "
        "files or a hub id"
    )


def _is_multilingual(name: str, num_rows: int) -> bool:
    """Whether a Whisper checkpoint is told the language; English-only ones have its tokens too."""
    from transformers import GenerationConfig

    try:
        told = getattr(GenerationConfig.from_pretrained(name), "is_multilingual", None)
    except OSError:  # Old checkpoints have no generation_config.json.
        told = None
    return num_rows != ENGLISH_ONLY_ROWS if told is None else told


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text as it is, with nothing around it."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special tokens, and of Whisper's timestamps, which are not declared to be special."""
    added = tokenizer.added_tokens_decoder.items()
    control = {index for index, token in added if token.special or CONTROL.fullmatch(token.content)}
    return control | set(tokenizer.all_special_ids)


def _in_one_form(text: str) -> str:
    """A text without the differences that there may be between forms of the same characters."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a space before text, as those of SentencePiece do."""
    first = tokenizer.convert_ids_to_tokens(_encode(tokenizer, "a"))[0]
    return first.startswith((WORD_BOUNDARY, BYTE_LEVEL_SPACE))


def _some(words: list[str]) -> str:
    """List a few words, and say how many more there are."""
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more} more" if more > 0 else "")
