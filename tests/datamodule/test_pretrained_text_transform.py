"""Tests of datamodule/pretrained_text_transform.py, with tiny checkpoints."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

import datamodule.pretrained_text_transform as pretrained_text_transform
from datamodule.av_dataset import AVDataset
from datamodule.label_list import LabelList
from datamodule.pretrained_text_transform import (
    PretrainedTextTransform,
    llama_text_transform,
    whisper_text_transform,
)
from datamodule.transforms import AudioTransform

TEXTS = [
    "bin blue at f two now",
    "PLACE RED IN O ZERO AGAIN",
    "Don't stop: the MEN'S 3 caf\u00e9s aren't open",
    "a",
]
PROMPT = "Transcribe the speech:"
MODELS = {"llama": LlamaForCausalLM, "whisper": WhisperForConditionalGeneration}


@pytest.fixture(scope="module")
def llama(tiny_checkpoints):
    return str(tiny_checkpoints / "llama")


@pytest.fixture(scope="module")
def whisper(tiny_checkpoints):
    return str(tiny_checkpoints / "whisper")


@pytest.fixture
def changed(tiny_checkpoints, tmp_path):
    """Copy a checkpoint, change its JSON files and leave out some files."""

    def copy(name, changes=None, without=()):
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoints / name, folder)
        for file, entries in (changes or {}).items():
            content = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps({**content, **entries}))
        for file in without:
            (folder / file).unlink()
        return str(folder)

    return copy


def load_llama(name, prompt=None, text_case="keep"):
    return llama_text_transform(name, prompt=prompt, text_case=text_case)


def load_whisper(name, language=None, task="transcribe", text_case="keep"):
    return whisper_text_transform(name, language=language, task=task, text_case=text_case)


LOADERS = {"llama": load_llama, "whisper": load_whisper}


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_tokens_are_the_rows_of_the_output_layer(tiny_checkpoints, name):
    transform = LOADERS[name](str(tiny_checkpoints / name))
    model = MODELS[name].from_pretrained(tiny_checkpoints / name)
    num_rows = model.get_output_embeddings().weight.shape[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoints / name)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    unused = list(range(len(tokenizer), num_rows))
    assert transform.odim == len(transform.token_list) == num_rows + 1
    assert transform.token_list == ["<blank>", *tokens, *(f"<unused_{i}>" for i in unused)]
    special = (set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)) | set(unused)
    assert transform.special_tokens == tuple(sorted(special - {tokenizer.eos_token_id}))
    assert transform.eos == tokenizer.eos_token_id + 1
    assert transform.sos == transform.prompt[-1] + 1


def test_one_of_them_has_unused_rows(whisper):
    assert load_whisper(whisper).token_list[-1].startswith("<unused_")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("text_case", ["keep", "lower"])
@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_round_trip(tiny_checkpoints, name, text, text_case):
    transform = LOADERS[name](str(tiny_checkpoints / name), text_case=text_case)
    expected = text if text_case == "keep" else text.lower()
    ids = transform.tokenize(f"  {text}\n")
    assert ids.dtype == torch.int64
    assert transform.post_process(ids) == expected
    assert transform.post_process(ids.tolist()) == expected
    assert not {*transform.special_tokens, transform.eos - 1} & set((ids - 1).tolist())
    before = " " if name == "whisper" else ""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoints / name)
    reference = tokenizer.encode(before + expected, add_special_tokens=False)
    assert ids.tolist() == [index + 1 for index in reference]
    assert tokenizer.decode(reference) == before + expected


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_what_is_no_text_is_left_out(tiny_checkpoints, name):
    transform = LOADERS[name](str(tiny_checkpoints / name))
    ids = transform.tokenize(TEXTS[0]).tolist()
    special = [index + 1 for index in transform.special_tokens]
    padded = [transform.sos, 0, *ids[:2], 0, *special, *ids[2:], transform.eos, -1, -1]
    assert transform.post_process(torch.tensor(padded)) == TEXTS[0]
    assert transform.post_process([]) == ""
    assert transform.post_process([-1, 0, transform.eos]) == ""
    assert transform.tokenize(" ").shape == (0,)
    assert transform.tokenize(" ").dtype == torch.int64


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_special_tokens_in_text_are_spelled(tiny_checkpoints, name):
    transform = LOADERS[name](str(tiny_checkpoints / name))
    text = transform.token_list[transform.eos]
    assert transform.eos not in transform.tokenize(text)
    assert transform.post_process(transform.tokenize(text)) == text


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_sentences_of_the_demo_are_a_token_a_word(tiny_checkpoints, name):
    transform = LOADERS[name](str(tiny_checkpoints / name), text_case="lower")
    for text in TEXTS[:2]:
        assert len(transform.tokenize(text)) == len(text.split())


def test_llama_begins_with_its_token_alone(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    transform = load_llama(llama)
    assert transform.prompt == (tokenizer.bos_token_id,) == tuple(tokenizer.encode(""))
    assert load_llama(llama, prompt="").prompt == transform.prompt


@pytest.mark.parametrize(
    ("prompt", "space"),
    [(PROMPT, " "), (f"{PROMPT}\n", ""), ("<|start_header_id|>user<|end_header_id|>", " ")],
)
def test_text_follows_the_prompt_of_llama(llama, prompt, space):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    transform = load_llama(llama, prompt=prompt)
    assert transform.prompt == tuple(tokenizer.encode(prompt))
    ids = [*transform.prompt, *(transform.tokenize(TEXTS[0]) - 1).tolist()]
    assert ids == tokenizer.encode(f"{prompt}{space}{TEXTS[0]}")
    assert load_llama(llama, prompt=f"<|begin_of_text|>{prompt}").prompt == transform.prompt


@pytest.mark.parametrize("normalized", [True, False])
def test_no_second_space_where_the_tokenizer_puts_one(normalized):
    """Tokenizers of LLaMA 2 begin every text with a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    if not normalized:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([f" {PROMPT}", *TEXTS], trainer)
    transform = PretrainedTextTransform(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ),
        num_rows=tokenizer.get_vocab_size(),
        prompt=(1,),
        eos=2,
        space_before_text=True,
        text_case="keep",
    )
    tokens = "".join(transform.token_list[index] for index in transform.tokenize(TEXTS[0]))
    assert tokens == "\u2581" + TEXTS[0].replace(" ", "\u2581")
    assert transform.special_tokens == (0, 1)


@pytest.mark.parametrize("task", ["transcribe", "translate"])
@pytest.mark.parametrize("language", [None, "en", "de", "fr"])
def test_prompt_of_whisper(whisper, language, task):
    tokenizer = AutoTokenizer.from_pretrained(whisper, language=language or "en", task=task)
    assert load_whisper(whisper, language, task).prompt == tuple(tokenizer.prefix_tokens)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens)
    assert tokens[1:] == [f"<|{language or 'en'}|>", f"<|{task}|>", "<|notimestamps|>"]


@pytest.mark.parametrize(
    ("changes", "without", "english_only"),
    [
        ({}, [], False),
        ({}, ["generation_config.json"], False),
        ({"generation_config.json": {"is_multilingual": False}}, [], True),
        ({"config.json": {"vocab_size": 51864}}, ["generation_config.json"], True),
    ],
)
def test_english_only_whisper(changed, changes, without, english_only):
    """Published English-only checkpoints have tokens of languages, but were trained without."""
    name = changed("whisper", changes, without)
    transform = load_whisper(name)
    assert len(transform.prompt) == (2 if english_only else 4)
    assert load_whisper(name, "en").prompt == transform.prompt
    if english_only:
        tokens = [transform.token_list[index + 1] for index in transform.prompt]
        assert tokens == ["<|startoftranscript|>", "<|notimestamps|>"]
        for options in ({"language": "de"}, {"task": "translate"}):
            with pytest.raises(ValueError, match="is English-only, got language .* and task"):
                load_whisper(name, **options)


def whisper_tokenizer(folder, special):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return WhisperTokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=special)


def test_whisper_without_tokens_of_languages(tiny_checkpoints, changed):
    name = changed("whisper", without=["generation_config.json"])
    special = ["<|startoftranscript|>", "<|notimestamps|>"]
    whisper_tokenizer(tiny_checkpoints / "whisper", special).save_pretrained(name)
    transform = load_whisper(name)
    assert [transform.token_list[index + 1] for index in transform.prompt] == special


def test_timestamps_are_no_text(whisper):
    tokenizer = AutoTokenizer.from_pretrained(whisper)
    times = ["<|0.00|>", "<|0.02|>"]
    tokenizer.add_tokens(times)
    ids = tokenizer.convert_tokens_to_ids(times)
    assert not set(ids) & set(tokenizer.all_special_ids)
    transform = PretrainedTextTransform(
        tokenizer=tokenizer,
        num_rows=len(tokenizer),
        prompt=(tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),),
        eos=tokenizer.eos_token_id,
        space_before_text=True,
        text_case="keep",
    )
    assert set(ids) <= set(transform.special_tokens)
    text = transform.tokenize("bin").tolist()
    assert transform.post_process([ids[0] + 1, *text, ids[1] + 1]) == "bin"


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_pickles(tiny_checkpoints, name):
    transform = LOADERS[name](str(tiny_checkpoints / name), text_case="lower")
    copy = pickle.loads(pickle.dumps(transform))
    assert vars(copy).keys() == vars(transform).keys()
    for text in TEXTS:
        torch.testing.assert_close(copy.tokenize(text), transform.tokenize(text))
    ids = transform.tokenize(TEXTS[0])
    assert copy.post_process([copy.sos, *ids, copy.eos]) == TEXTS[0]
    assert (copy.token_list, copy.prompt, copy.special_tokens) == (
        transform.token_list,
        transform.prompt,
        transform.special_tokens,
    )


@pytest.mark.parametrize("file", ["ids.csv", "text.csv"])
@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_targets_from_a_worker(tiny_checkpoints, corpus, text_transform, name, file):
    transform = LOADERS[name](str(tiny_checkpoints / name))
    dataset = AVDataset(
        labels=LabelList(str(corpus.root), file),
        text_transform=transform,
        id_text_transform=text_transform,
        audio_transform=AudioTransform(subset="val", normalize=False),
    )
    items = list(DataLoader(dataset, batch_size=None, num_workers=1))
    assert len(items) == len(corpus.texts)
    for item, text in zip(items, corpus.texts, strict=True):
        torch.testing.assert_close(item["target"], transform.tokenize(text))
        assert transform.post_process(item["target"]) == text


def test_transformers_is_imported_when_needed(llama):
    """A fresh process gets the tokenizer from the files alone."""
    program = f"""
import sys
from datamodule.pretrained_text_transform import llama_text_transform
print("transformers" in sys.modules)
transform = llama_text_transform({llama!r}, prompt=None, text_case="lower")
print(transform.post_process(transform.tokenize("BIN BLUE")))
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["False", "bin blue"]


def test_ids_in_the_configs_of_tiny_checkpoints(tiny_checkpoints, llama, whisper):
    """What generates with these checkpoints reads the ids from their configs."""
    transform = load_llama(llama)
    for file in ("config.json", "generation_config.json"):
        config = json.loads((tiny_checkpoints / "llama" / file).read_text())
        assert config["bos_token_id"] == transform.prompt[0]
        assert config["eos_token_id"] == transform.eos - 1
    transform = load_whisper(whisper, "fr", "translate")
    for file in ("config.json", "generation_config.json"):
        config = json.loads((tiny_checkpoints / "whisper" / file).read_text())
        assert config["decoder_start_token_id"] == transform.prompt[0]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert config[key] == transform.eos - 1
        begin = [transform.token_list[index + 1] for index in config["begin_suppress_tokens"]]
        assert begin == ["\u0120", "<|endoftext|>"]
    assert config["lang_to_id"]["<|fr|>"] == transform.prompt[1]
    assert config["task_to_id"]["translate"] == transform.prompt[2]
    assert config["no_timestamps_token_id"] == transform.prompt[3]
    suppressed = {transform.token_list[index + 1] for index in config["suppress_tokens"]}
    assert {"(", "[", "<|startoftranscript|>", "<|nospeech|>"} <= suppressed
    assert not {"'", ",", "<|endoftext|>", "<|notimestamps|>"} & suppressed


def one_line(message, error):
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_folder_without_tokenizer(changed, name):
    folder = changed(name, without=["tokenizer.json"])
    with pytest.raises(ValueError, match="--decoder-name .* has no tokenizer, looked for") as error:
        LOADERS[name](folder)
    one_line("tokenizer.json, tokenizer.model, vocab.json with merges.txt: give a folder", error)


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_broken_tokenizer(changed, name):
    folder = changed(name)
    with open(f"{folder}/tokenizer.json", "w") as file:
        file.write('{"model": {"type": "none"}}')
    with pytest.raises(ValueError, match="--decoder-name .* cannot be loaded") as error:
        LOADERS[name](folder)
    one_line("give --decoder-name a folder with tokenizer files or the hub id", error)


def test_wrong_architecture(llama, whisper, monkeypatch):
    for load, name, message in (
        (load_llama, whisper, "is a checkpoint of whisper, one of llama, mistral,.* is expected"),
        (load_whisper, llama, "is a checkpoint of llama, one of whisper is expected"),
    ):
        with pytest.raises(ValueError, match=message):
            load(name)
    # That of a hub id is seen only when its config has been fetched.
    monkeypatch.setattr(pretrained_text_transform, "folder_problem", lambda *_: None)
    with pytest.raises(
        ValueError, match="is a checkpoint of whisper, one of llama, mistral,.* is expected"
    ):
        load_llama(whisper)


def test_no_such_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--decoder-name .* is no folder: give a folder"):
        load_llama(str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--decoder-name nobody/none is neither") as error:
        load_llama("nobody/none")
    one_line("give --decoder-name", error)


def test_llama_without_a_token_that_ends(changed):
    folder = changed("llama", {"tokenizer_config.json": {"eos_token": None}})
    with pytest.raises(ValueError, match="has a tokenizer without eos_token, one") as error:
        load_llama(folder)
    one_line(folder, error)


@pytest.mark.parametrize(
    ("named", "begin"),
    [
        ("<|start_header_id|>", "<|start_header_id|>"),  # as the config of Qwen does
        ("a", "<|end_of_text|>"),  # The default of a config may be any token.
        (None, "<|end_of_text|>"),
    ],
)
def test_what_stands_in_for_bos(changed, llama, named, begin):
    """The tokenizer has none, as Qwen's: it begins with what the config names, or with EOS."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    named, begin = (token and tokenizer.convert_tokens_to_ids(token) for token in (named, begin))
    changes = {"tokenizer_config.json": {"bos_token": None}, "config.json": {"bos_token_id": named}}
    folder = changed("llama", changes)
    assert AutoTokenizer.from_pretrained(folder).bos_token_id is None
    transform = load_llama(folder)
    assert transform.prompt == (begin,)
    assert transform.sos == begin + 1
    assert begin == transform.eos - 1 or begin in transform.special_tokens
    text = tokenizer.encode(PROMPT, add_special_tokens=False)
    assert load_llama(folder, prompt=PROMPT).prompt == (begin, *text)


def test_whisper_without_special_tokens(tiny_checkpoints, changed):
    folder = changed("whisper")
    whisper_tokenizer(tiny_checkpoints / "whisper", []).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"without <\|startoftranscript\|>, <\|notimestamps\|>"):
        load_whisper(folder)


def test_unknown_language_task_and_case(llama, whisper):
    with pytest.raises(ValueError, match="no language 'xx', expected one of de, en, es, fr, ko"):
        load_whisper(whisper, "xx")
    with pytest.raises(ValueError, match="ko and 2 more$"):
        load_whisper(whisper, "english")
    with pytest.raises(ValueError, match="got task 'sing', expected transcribe or translate"):
        load_whisper(whisper, task="sing")
    for load, name in ((load_llama, llama), (load_whisper, whisper)):
        with pytest.raises(ValueError, match="got text case 'upper', expected keep or lower"):
            load(name, text_case="upper")


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_tokenizer_larger_than_the_output_layer(changed, name):
    folder = changed(name, {"config.json": {"vocab_size": 300}})
    with pytest.raises(ValueError, match="but the output layer has 300 rows: give a checkpoint"):
        LOADERS[name](folder)


def test_special_tokens_without_a_row_are_harmless(llama):
    """Some have added a token for padding to the tokenizer, but not to the weights."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    num_rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    options = {
        "tokenizer": tokenizer,
        "num_rows": num_rows,
        "eos": tokenizer.eos_token_id,
        "space_before_text": False,
        "text_case": "keep",
    }
    transform = PretrainedTextTransform(prompt=(tokenizer.bos_token_id,), **options)
    assert transform.odim == num_rows + 1
    assert max(transform.special_tokens) == num_rows - 1
    with pytest.raises(ValueError, match=f"token '<pad>' with id {num_rows}, but the output"):
        PretrainedTextTransform(prompt=(num_rows,), **options)
    with pytest.raises(ValueError, match="got an empty prompt"):
        PretrainedTextTransform(prompt=(), **options)


def test_text_in_the_form_that_the_model_writes(tiny_checkpoints, changed):
    decomposed = "cafe\u0301"
    plain = load_llama(str(tiny_checkpoints / "llama"))
    assert plain.normalize(decomposed) == plain.post_process(plain.tokenize(decomposed))
    folder = Path(changed("llama"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    composing = load_llama(str(folder))
    assert composing.normalize(decomposed) == "caf\u00e9"
    assert load_llama(str(folder), text_case="lower").normalize("CAFE\u0301") == "caf\u00e9"
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    tokenizer.save(str(folder / "tokenizer.json"))
    # Letters that a tokenizer loses are errors of a model that cannot write them.
    assert load_llama(str(folder)).normalize("caf\u00e9") == "caf\u00e9"


def test_what_a_tokenizer_loses_is_listed(tiny_checkpoints, changed):
    assert load_llama(str(tiny_checkpoints / "llama")).unknown("bin Ж\u00e9 7") == []
    folder = Path(changed("llama"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("Ж", "")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_llama(str(folder)).unknown("bin Ж\u00e9Ж 7") == ["Ж", "Ж"]
