"""README: its commands run, and its tables name every option and every file."""

import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import train
from datamodule import demo_corpus, train_tokenizer
from espnet.nets.encoders import AUDIO_ENCODERS, VISION_ENCODERS, pretrained_of
from espnet.utils import export
from espnet.utils import tiny_checkpoints as tiny_checkpoints_module
from espnet.utils.options import eval_parser, train_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    command.strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
]


def command(start):
    """The words of README's one command that begins so."""
    (found,) = [shlex.split(text) for text in COMMANDS if text.startswith(start)]
    return found


def test_every_command_is_known():
    starts = ("pip ", "bash .ci/", "python train.py", "python eval.py", "python -m", "pytest")
    assert all(text.startswith(starts) for text in COMMANDS)
    assert len(COMMANDS) >= 20


def test_files_of_commands_that_install_exist():
    for text in COMMANDS:
        names = re.findall(r"(?:-[cr]|^bash) (\S+)", text)
        assert bool(names) == text.startswith(("pip install", "bash"))
        assert all((ROOT / name).is_file() for name in names)


def test_first_commands_install_what_is_pinned():
    installs = [text for text in COMMANDS if text.startswith("pip install")]
    assert ["-c constraints.txt" in text for text in installs] == [True, True, False]
    assert "-c constraints.txt" in (ROOT / ".ci/run").read_text()


def test_options_table_is_complete():
    rows = re.findall(r"^\| (\w+) \| `(--.*)` \|$", README, flags=re.MULTILINE)
    titles = {group.title: group for group in train_parser()._action_groups}
    for title, flags in rows:
        actions = titles[title]._group_actions
        assert flags.split() == [action.option_strings[0] for action in actions]
    assert {title for title, _ in rows} == set(titles) - {"positional arguments", "options"}


def test_relative_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)|src=\"([^\"]+)\"", README)
    paths = [one or two for one, two in links]
    assert paths
    assert all((ROOT / path).exists() for path in paths)


@pytest.fixture
def in_folder(corpus, tmp_path, monkeypatch):
    """An empty working folder in which DATA is the small corpus."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA").symlink_to(corpus)
    return tmp_path


def test_training_and_scoring_commands(in_folder):
    """As README has them, but for the sizes of a small model and two epochs."""
    small = "--adim 16 --aheads 2 --eunits 16 --elayers 1 --dunits 16 --dlayers 1 --video-width 2 "
    small += "--audio-width 2 --max-epochs 2 --warmup-epochs 1 --beam-size 2 --num-workers 0"
    train.main(command("python train.py --exp-dir")[2:] + small.split())
    table = re.findall(r"^\| (`[^|]*`) \| ", README, flags=re.MULTILINE)
    names = {name for row in table for name in re.findall(r"`([^`-][^`]*)`", row)}
    present = {path.name for path in (in_folder / "exp/base").iterdir()}
    assert {re.sub(r"\d+(?=\.ckpt)", "N", name) for name in present} == {
        name.rstrip("/") for name in names if not name.startswith("exp")
    }
    evaluation.main(
        command("python eval.py --pretrained-model-path exp")[2:] + ["--beam-size", "2"]
    )
    assert (in_folder / "exp/base/model_avg_10_test_audiovisual/summary.json").is_file()


def test_auto_avsr_command_parses():
    words = command("python eval.py --modality video")
    assert eval_parser().parse_args(words[2:]).modality == "video"


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
        for word in command("python -m datamodule.train_tokenizer")
    ]
    words[words.index("--vocab-size") + 1] = "40"
    train_tokenizer.main(words[3:])
    assert (tmp_path / "text/spm/unigram_units.txt").is_file()


TINY = [shlex.split(text)[2:] for text in COMMANDS if "tiny/" in text]


def test_commands_with_tiny_checkpoints_cover_every_pretrained_encoder():
    given = [set(words) for words in TINY]
    for vision in pretrained_of(VISION_ENCODERS):
        for audio in pretrained_of(AUDIO_ENCODERS):
            assert any({f"tiny/{vision}", f"tiny/{audio}"} <= words for words in given)


@pytest.mark.parametrize("words", TINY, ids=lambda words: words[words.index("--exp-name") + 1])
def test_commands_with_tiny_checkpoints(in_folder, tiny_checkpoints, corpus, monkeypatch, words):
    """As README has them, on the small corpus and for one batch."""
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
    export.main(command("python -m espnet.utils.export")[3:])
    assert (in_folder / "exported/model.pth").is_file()
    assert (in_folder / "exported/decoder/config.json").is_file()


@pytest.mark.parametrize(
    "start",
    [
        "python train.py --exp-name clip",
        "python train.py --exp-name large",
        "python train.py --exp-name qlora_8b",
    ],
)
@pytest.mark.usefixtures("in_folder")
def test_commands_with_published_checkpoints_parse(start):
    options, _ = train.parse_args(command(start)[2:])
    encoders = options.model.encoders
    assert encoders.modality == "audiovisual"
    assert {encoders.vision_encoder, encoders.audio_encoder} == {"clip", "whisper"}


def test_commands_of_published_whispers(in_folder, tiny_checkpoints, monkeypatch):
    """As README has them, with a tiny Whisper in its place."""
    tiny = str(tiny_checkpoints / "whisper")
    words = command("python eval.py --audio-encoder whisper")[2:]
    words[words.index("--decoder-name") + 1] = tiny
    evaluation.main([*words, "--max-dec-tokens", "3", "--beam-size", "2", "--num-workers", "0"])
    assert (in_folder / "whisper_test_audio/summary.json").is_file()
    monkeypatch.setattr(train, "make_corpus", lambda *_: None)
    (in_folder / "demo_corpus").symlink_to(in_folder / "DATA")
    words = command("python train.py --demo --recipe")[2:]
    words[words.index("--decoder-name") + 1] = tiny
    train.main([*words, "--fast-dev-run", "--num-workers", "0"])


def test_tiny_checkpoints_command(in_folder, capsys):
    words = command("python -m espnet.utils.tiny_checkpoints")
    tiny_checkpoints_module.main(words[3:])
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
