"""The documentation: its commands run, its links lead somewhere, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import train
from datamodule import demo_corpus, train_tokenizer
from espnet.nets.decoders import CAUSAL_LM_TYPES, DECODERS
from espnet.nets.encoders import AUDIO_ENCODERS, VISION_ENCODERS, pretrained_of
from espnet.utils import export
from espnet.utils import tiny_checkpoints as tiny_checkpoints_module
from espnet.utils.options import eval_parser, train_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS.glob("*.md"))
}
README = PAGES[ROOT / "README.md"]
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    command.strip()
    for page in PAGES.values()
    for language, block in CODE.findall(page)
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
]
SCRIPTS = {"train.py": train_parser, "eval.py": eval_parser}
OF_BENCHMARKS = {"--encoder", "--llama-layers"}  # flags that pages name, and no script has


def command(*words):
    """The one command that has these words, in any order, after `python`, `-m` and the program."""
    found = [each for each in map(shlex.split, COMMANDS) if set(words) <= set(each)]
    assert len(found) == 1, f"{words}: {found}"
    (given,) = found
    assert given[0] == "python"
    return given[3:] if given[1] == "-m" else given[2:]


def prose(page):
    """A page without its blocks of code."""
    return CODE.sub("", page)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


def test_every_command_is_known():
    starts = ("pip ", "bash .ci/", "python train.py", "python eval.py", "python -m", "pytest")
    assert all(text.startswith(starts) for text in COMMANDS)
    assert len(COMMANDS) >= 20
    assert len(set(COMMANDS)) == len(COMMANDS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_of_scripts_parse(script):
    given = [shlex.split(text) for text in COMMANDS if text.startswith(f"python {script}")]
    assert len(given) >= 3
    for words in given:
        SCRIPTS[script]().parse_args(words[2:])


def test_files_of_commands_that_install_exist():
    for text in COMMANDS:
        names = (
            re.findall(r"(?:-[cr]|^bash) (\S+)", text) if text.startswith(("pip", "bash")) else []
        )
        assert bool(names) == text.startswith(("pip install", "bash"))
        assert all((ROOT / name).is_file() for name in names)


def test_commands_install_what_is_pinned():
    for text in COMMANDS:
        if text.startswith("pip install"):
            assert ("-c constraints.txt" in text) != ("torch==" in text)
    assert "-c constraints.txt" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\((?!http)([^)]+)\)|src=\"([^\"]+)\"", prose(PAGES[path]))
    for link in map("".join, links):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(PAGES[target]), link


def test_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(docs/([^)#]+)\)", README))
    assert linked == {path.name for path in PAGES if path.parent == DOCS}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_flags_that_are_named_exist(path):
    known = {flag for parser in SCRIPTS.values() for flag in parser()._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", prose(PAGES[path])))
    assert named <= known | OF_BENCHMARKS


def test_layout_names_files_that_exist():
    (block,) = [block for _, block in CODE.findall(README) if "espnet/option_tree.py" in block]
    folders = []  # in which a line is, by its indentation
    for line in block.splitlines():
        column, indent = re.match(r" *(.+?)  ", line)[1], len(line) - len(line.lstrip())
        del folders[indent // 2 :]
        parents = [*folders]
        for name in column.split(", "):
            assert ROOT.joinpath(*parents, name).exists(), line
        folders.append(column)


@pytest.mark.parametrize(
    ("page", "flag", "names"),
    [
        ("encoders.md", "--vision-encoder ", VISION_ENCODERS),
        ("encoders.md", "--audio-encoder ", AUDIO_ENCODERS),
        ("decoders.md", "--decoder ", DECODERS),
        ("decoders.md", "", CAUSAL_LM_TYPES),
    ],
)
def test_tables_have_a_row_for_everything_there_is(page, flag, names):
    rows = re.findall(rf"^\| `{flag}(\w+)", PAGES[DOCS / page], flags=re.MULTILINE)
    assert set(names) <= set(rows)


@pytest.fixture
def in_folder(corpus, tmp_path, monkeypatch):
    """An empty working folder in which DATA is the small corpus."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA").symlink_to(corpus)
    return tmp_path


def test_training_and_scoring_commands(in_folder):
    """As the pages have them, but for the sizes of a small model and two epochs."""
    small = "--adim 16 --aheads 2 --eunits 16 --elayers 1 --dunits 16 --dlayers 1 --video-width 2 "
    small += "--audio-width 2 --max-epochs 2 --warmup-epochs 1 --beam-size 2 --num-workers 0"
    train.main(command("train.py", "base") + small.split())
    table = re.findall(r"^\| (`[^|]*`) \| ", PAGES[DOCS / "scale.md"], flags=re.MULTILINE)
    names = {name for row in table for name in re.findall(r"`([^`]*)`", row)}
    present = {path.name for path in (in_folder / "exp/base").iterdir()}
    assert {re.sub(r"\d+(?=\.ckpt)", "N", name) for name in present} == {
        name.rstrip("/") for name in names
    }
    evaluation.main(command("eval.py", "exp/base/model_avg_10.pth") + ["--beam-size", "2"])
    assert (in_folder / "exp/base/model_avg_10_test_audiovisual/summary.json").is_file()


def test_tokenizer_command(corpus, tmp_path):
    lists = tmp_path / "text" / "labels"
    lists.mkdir(parents=True)
    rows = (corpus / "labels/train.csv").read_text().splitlines()
    texts = [line.split(maxsplit=1)[1] for line in (corpus / "labels/train.txt").open()]
    fields = [",".join(row.split(",")[:3]) for row in rows]
    (lists / "train.csv").write_text(
        "".join(f"{f},{t}" for f, t in zip(fields, texts, strict=True))
    )
    words = [
        word.replace("DATA", str(tmp_path / "text"))
        for word in command("datamodule.train_tokenizer")
    ]
    words[words.index("--vocab-size") + 1] = "40"
    train_tokenizer.main(words)
    assert (tmp_path / "text/spm/unigram_units.txt").is_file()


TINY = [shlex.split(text)[2:] for text in COMMANDS if "tiny/" in text]


def test_commands_with_tiny_checkpoints_cover_every_pretrained_encoder():
    given = [set(words) for words in TINY]
    for vision in pretrained_of(VISION_ENCODERS):
        for audio in pretrained_of(AUDIO_ENCODERS):
            assert any({f"tiny/{vision}", f"tiny/{audio}"} <= words for words in given)


@pytest.mark.parametrize("words", TINY, ids=lambda words: words[words.index("--exp-name") + 1])
def test_commands_with_tiny_checkpoints(in_folder, tiny_checkpoints, corpus, monkeypatch, words):
    """As the pages have them, on the small corpus and for one batch."""
    monkeypatch.setattr(demo_corpus, "make_demo_corpus", lambda root_dir: None)  # noqa: ARG005
    (in_folder / "demo_corpus").symlink_to(corpus)
    (in_folder / "tiny").symlink_to(tiny_checkpoints)
    train.main([*words, "--fast-dev-run", "--num-workers", "0"])


def test_export_command(in_folder, tiny_checkpoints, corpus, monkeypatch):
    """Of the run of the command with QLoRA, on the small corpus."""
    monkeypatch.setattr(demo_corpus, "make_demo_corpus", lambda root_dir: None)  # noqa: ARG005
    (in_folder / "demo_corpus").symlink_to(corpus)
    (in_folder / "tiny").symlink_to(tiny_checkpoints)
    (words,) = [words for words in TINY if "--use-qlora" in words]
    assert words[words.index("--exp-name") + 1] == "qlora"
    small = "--adim 16 --aheads 2 --eunits 16 --elayers 1 --num-workers 0 --decode-snr-target 0"
    train.main([*words, *small.split(), "--modality-dropout", "0", "0", "--max-dec-tokens", "3"])
    export.main(command("espnet.utils.export"))
    assert (in_folder / "exported/model.pth").is_file()
    assert (in_folder / "exported/decoder/config.json").is_file()


@pytest.mark.parametrize(
    ("name", "decoder"),
    [("clip_whisper", "transformer"), ("large", "transformer"), ("qlora_8b", "llama")],
)
@pytest.mark.usefixtures("in_folder")
def test_commands_with_published_checkpoints_fit_together(name, decoder):
    options, _ = train.parse_args(command("train.py", name, "DATA"))
    assert options.model.decoder.decoder == decoder
    encoders = options.model.encoders
    assert encoders.modality == "audiovisual"
    assert {encoders.vision_encoder, encoders.audio_encoder} == {"clip", "whisper"}


def test_commands_of_published_whispers(in_folder, tiny_checkpoints, monkeypatch):
    """As the pages have them, with a tiny Whisper in its place."""
    tiny = str(tiny_checkpoints / "whisper")
    words = command("eval.py", "openai/whisper-small")
    words[words.index("--decoder-name") + 1] = tiny
    evaluation.main([*words, "--max-dec-tokens", "3", "--beam-size", "2", "--num-workers", "0"])
    assert (in_folder / "whisper_test_audio/summary.json").is_file()
    monkeypatch.setattr(train, "make_corpus", lambda *_: None)
    (in_folder / "demo_corpus").symlink_to(in_folder / "DATA")
    words = command("train.py", "--recipe", "whisper")
    words[words.index("--decoder-name") + 1] = tiny
    train.main([*words, "--fast-dev-run", "--num-workers", "0"])


def test_tiny_checkpoints_command(in_folder, capsys):
    tiny_checkpoints_module.main(command("espnet.utils.tiny_checkpoints"))
    assert "tiny/whisper" in capsys.readouterr().out
    assert (in_folder / "tiny/whisper/config.json").is_file()


@pytest.mark.slow
def test_demo(in_folder, monkeypatch, capsys):
    """The whole demo, on few sentences and for one epoch."""
    whole = demo_corpus.make_demo_corpus

    def few(root_dir):
        return whole(root_dir, num_train=8, num_val=4, num_test=4)

    monkeypatch.setattr(demo_corpus, "make_demo_corpus", few)
    assert "python train.py --demo" in COMMANDS
    arguments = ["--demo", "--max-epochs", "1"]
    train.main(arguments)
    out = capsys.readouterr().out
    header = re.search(r"^\| WER \[%\] \|.*$", README, flags=re.MULTILINE).group()
    assert header in out
    assert (
        len(re.findall(r"^\| (audio|video|audio-visual) \|( [\d.]+ \|){5}$", out, re.MULTILINE))
        == 3
    )
    named, seconds = out.split("Files of the run:")[1].split("Seconds: ")
    assert re.match(
        r"corpus \d+, preparing \d+, training \d+, averaging \d+, scoring \d+;", seconds
    )
    files = [Path(line.strip()) for line in named.splitlines() if line]
    assert len(files) > 15
    assert all(path.is_file() for path in files)
    made = (in_folder / "demo_corpus/corpus.json").stat().st_mtime_ns
    train.main(arguments)
    assert (in_folder / "demo_corpus/corpus.json").stat().st_mtime_ns == made
    assert "keeping the demo corpus" in capsys.readouterr().out
