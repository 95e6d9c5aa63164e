"""The entry scripts with pretrained encoders: a run, its checkpoints, its scoring, mistakes."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import eval as evaluation
import train
from datamodule.media import read_audio
from datamodule.pretrained_text_transform import whisper_text_transform
from espnet.nets.model_options import ModelOptions
from espnet.option_tree import from_flat, to_flat
from espnet.utils import export
from espnet.utils.checkpoint import read_state_dict
from espnet.utils.options import train_parser
from espnet.utils.recipes import DEMO_OPTIONS, RECIPES, demo_options
from tests.causal_lm_cases import make_checkpoint
from tests.tables import PRETRAINED
from tests.test_train_and_eval import error_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def arguments(train_arguments, tiny_checkpoints):
    """Command line of train.py for given encoders, which tell the modality."""

    def of(name, vision, audio, *more):
        words = [word for word in train_arguments(name, "") if word not in ("--modality", "")]
        for stream, encoder in (("vision", vision), ("audio", audio)):
            if encoder is not None:
                words += [f"--{stream}-encoder", encoder]
            if encoder in PRETRAINED:
                words += [f"--{stream}-encoder-name", str(tiny_checkpoints / encoder)]
        return [*words, *more]

    of.exp_dir = train_arguments.exp_dir
    return of


@pytest.fixture(scope="module")
def run_dir(arguments):
    """An audio-visual run with frozen CLIP and Whisper encoders."""
    more = ["--test-file", "test.csv", "--elayers", "0", "--modality-dropout", "0.2", "0.2"]
    train.main(arguments("clip_whisper", "clip", "whisper", *more))
    return arguments.exp_dir / "clip_whisper"


def test_config_names_what_followed_from_the_flags(run_dir, tiny_checkpoints):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["modality"] == "audiovisual"
    assert config["audio_encoder_name"] == str(tiny_checkpoints.resolve() / "whisper")
    assert config["freeze_vision_encoder"] is True
    assert "transformers" in config["versions"]


def test_checkpoints_hold_what_is_trained_and_name_the_rest(run_dir, tiny_checkpoints):
    for name in ("last.ckpt", "epoch=0.ckpt", "model_avg_10.pth"):
        state = read_state_dict(run_dir / name)
        assert not any(".backbone." in entry for entry in state)
        assert not any("encoder.encoders" in entry for entry in state)  # --elayers 0
        bases = torch.load(run_dir / name, weights_only=True)["bases"]
        assert {part: base["name"] for part, base in bases.items()} == {
            "video_frontend.backbone": str(tiny_checkpoints.resolve() / "clip"),
            "audio_frontend.backbone": str(tiny_checkpoints.resolve() / "whisper"),
        }
        assert all(re.fullmatch("[0-9a-f]{16}", base["fingerprint"]) for base in bases.values())
    content = torch.load(run_dir / "last.ckpt", weights_only=True)
    (optimizer,) = content["optimizer_states"]
    assert len(optimizer["state"]) == len(content["state_dict"])  # There are no buffers.
    grouped = [index for group in optimizer["param_groups"] for index in group["params"]]
    assert sorted(grouped) == sorted(optimizer["state"])
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.03, 0.0}


def test_unfrozen_layers_are_in_checkpoints(arguments):
    more = ["--unfreeze-last-layers", "1", "--max-epochs", "1"]
    train.main(arguments("unfrozen", "clip", None, *more))
    state = read_state_dict(arguments.exp_dir / "unfrozen/last.ckpt")
    found = {name for name in state if ".backbone." in name}
    prefix = "video_frontend.backbone."
    assert len(found) == 18
    layer, norm = f"{prefix}encoder.layers.1.", f"{prefix}post_layernorm."
    assert all(name.startswith((layer, norm)) for name in found)


@pytest.mark.parametrize("modality", ["audiovisual", "audio", "video"])
def test_eval_takes_the_encoders_from_the_run(run_dir, corpus, modality):
    path = run_dir / "model_avg_10.pth"
    evaluation.main(
        [
            *["--pretrained-model-path", str(path), "--root-dir", str(corpus)],
            *["--test-file", "test.csv", "--modality", modality, "--num-workers", "0"],
        ]
    )
    (lines,) = (run_dir / f"model_avg_10_test_{modality}").glob("*.jsonl")
    found = [json.loads(line)["hypothesis"] for line in lines.read_text().splitlines()]
    assert len(found) == 4
    if modality == "audiovisual":
        (own,) = (run_dir / "test").glob("*.jsonl")
        assert lines.read_text() == own.read_text()


@pytest.mark.parametrize(
    ("vision", "audio", "modality"),
    [("vit", None, "video"), (None, "wavlm", "audio"), ("vit", "resnet1d", "audiovisual")],
)
def test_the_modality_follows_from_the_encoders(arguments, capsys, vision, audio, modality):
    words = arguments(f"follows_{modality}", vision, audio, "--max-epochs", "1")
    train.main([*words, "--unfreeze-last-layers", "1", "--encoder-layer", "weighted"])
    assert f" M parameters ({modality}) in " in capsys.readouterr().out


@pytest.mark.parametrize("audio", ["resnet1d", "whisper", "wavlm"])
def test_mixed_precision_trains(arguments, audio):
    words = arguments(f"bf16_{audio}", "vit", audio, "--max-epochs", "1", "--encoder-layer", "1")
    train.main([*words, "--precision", "bf16-mixed"])
    state = read_state_dict(arguments.exp_dir / f"bf16_{audio}/last.ckpt")
    assert all(value.isfinite().all() for value in state.values())


def test_resuming_trains_on_with_pretrained_encoders(arguments):
    straight = arguments("straight", None, "whisper", "--no-freeze-audio-encoder")
    train.main(straight)
    stopped = arguments("stopped", None, "whisper", "--no-freeze-audio-encoder")
    train.main(stopped)
    train.main([*stopped, "--ckpt-path", str(arguments.exp_dir / "stopped/epoch=0.ckpt")])
    one = read_state_dict(arguments.exp_dir / "straight/last.ckpt")
    two = read_state_dict(arguments.exp_dir / "stopped/last.ckpt")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=0, msg=name)


def test_whisper_hears_audio_that_is_not_normalised(tiny_checkpoints, corpus):
    from espnet.utils.building import build_data, build_text_transform

    data = {}
    for encoder in ("whisper", "wavlm"):
        options, _ = train.parse_args(
            [
                *["--exp-name", "x", "--root-dir", str(corpus), "--train-file", "train.csv"],
                *["--val-file", "val.csv", "--num-workers", "0", "--audio-encoder", encoder],
                *["--audio-encoder-name", str(tiny_checkpoints / encoder)],
            ]
        )
        transform = build_text_transform(options.model.decoder, options.data)
        module = build_data(options, "audio", transform)
        module.setup("validate")
        data[encoder] = module.val_dataset[0]["audio"]
    assert data["whisper"].abs().max() <= 1
    normalised = torch.nn.functional.layer_norm(data["whisper"], data["whisper"].shape, eps=1e-8)
    torch.testing.assert_close(data["wavlm"], normalised)


def test_long_utterances_are_refused_for_whisper_before_anything_is_written(
    arguments, corpus, capsys
):
    row = (corpus / "labels/train.csv").read_text().splitlines()[0].split(",")
    (corpus / "labels/long.csv").write_text(f"{row[0]},{row[1]},751,{row[3]}\n")
    more = ["--train-file", "long.csv", "--max-frames", "1600"]
    error = error_of(capsys, train, arguments("long", None, "whisper", *more))
    assert "long.csv, line 1: got a clip of 751 frames, expected at most 750; the audio" in error
    assert "takes 30 s: remove it or choose another --audio-encoder" in error
    assert not (arguments.exp_dir / "long").exists()


def test_contradictions_are_named_at_once_and_before_torch_is_imported(corpus, tmp_path):
    code = (
        "import sys, train\n"
        "try:\n"
        "    train.main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    assert 'torch' not in sys.modules\n"
        "    sys.exit(end.code)\n"
    )
    words = [
        *["--exp-name", "x", "--root-dir", str(corpus), "--train-file", "train.csv"],
        *["--val-file", "val.csv", "--modality", "video", "--audio-encoder", "whisper"],
        *["--vision-encoder-name", str(tmp_path), "--adim", "7"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    for part in (
        "--audio-encoder whisper contradicts --modality video: leave one out",
        f"--vision-encoder-name {tmp_path}, but resnet loads no checkpoint",
        "--adim 7 must be even",
    ):
        assert part in done.stderr


def test_heads_matter_only_where_something_attends_with_them(corpus, tiny_checkpoints, capsys):
    words = ["--exp-name", "x", "--root-dir", str(corpus), "--train-file", "train.csv"]
    words += ["--val-file", "val.csv", "--audio-encoder", "whisper", "--adim", "512"]
    words += ["--audio-encoder-name", str(tiny_checkpoints / "whisper")]
    model = train.parse_args([*words, "--decoder", "whisper"])[0].model
    assert (model.adim, model.aheads, model.elayers) == (512, 12, 0)
    for more in (["--decoder", "whisper", "--elayers", "1"], ["--elayers", "0"], []):
        error = error_of(capsys, train, [*words, *more])
        assert "--adim 512 must be even and a multiple of --aheads 12" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vision-encoder-name", "./gone"], r"--vision-encoder-name ./gone is no folder: give"),
        (["--vision-encoder-name", "CLIP"], r"clip is a checkpoint of clip, one of vit is expect"),
        (["--encoder-layer", "9"], r"--encoder-layer 9, but vit has 2 layers: choose -1 to 2"),
        (["--unfreeze-last-layers", "3"], r"but 2 layers of vit are in use: choose at most 2"),
        (["--vision-image-size", "90"], r"--vision-image-size 90 is no multiple of the patch"),
        (["--encoder-layer", "last"], r"last is no hidden layer: -1, a number from 0, or weigh"),
    ],
)
def test_mistakes_are_one_line(arguments, tiny_checkpoints, capsys, options, message):
    options = [str(tiny_checkpoints / "clip") if word == "CLIP" else word for word in options]
    error = error_of(capsys, train, arguments("mistake", "vit", None, *options))
    assert re.search(message, error), error
    assert not (arguments.exp_dir / "mistake").exists()


def test_the_demo_takes_other_encoders(tiny_checkpoints, corpus):
    words = ["--demo", "--root-dir", str(corpus), "--vision-encoder", "vit"]
    words += ["--vision-encoder-name", str(tiny_checkpoints / "vit")]

    def demo_of(*words):
        return demo_options(from_flat(ModelOptions, vars(train_parser().parse_args(words))))

    assert {"modality", "audio_encoder", "modality_dropout"}.isdisjoint(demo_of(*words))
    assert "modality_dropout" in demo_of(*words, "--audio-encoder", "wavlm")
    assert demo_of("--demo") == DEMO_OPTIONS
    # What a pretrained decoder learns in so few steps, CTC over its vocabulary does not.
    for decoder in ("whisper", "llama"):
        options = demo_of("--demo", "--decoder", decoder)
        assert {"ctc_weight", "ctc_decode_weight"}.isdisjoint(options)
    words = ["--demo", "--decoder", "whisper", "--audio-encoder", "whisper"]
    assert {"adim", "elayers"}.isdisjoint(demo_of(*words))


def test_a_recipe_gives_defaults_that_flags_override(corpus, tiny_checkpoints, monkeypatch):
    monkeypatch.setattr(train, "make_corpus", lambda *_: None)
    words = ["--recipe", "whisper", "--decoder-name", str(tiny_checkpoints / "whisper")]
    words += ["--root-dir", str(corpus), "--lr", "1e-4"]
    for demo, train_file, clip in ((True, "train_240.csv", 48), (False, "train.csv", 88)):
        more = ["--demo"] if demo else ["--exp-name", "x", "--train-file", train_file]
        more += ["--val-file", "val.csv"]
        options = to_flat(train.parse_args([*words, *more])[0])
        expected = {
            **RECIPES["whisper"].options,
            **{"modality": "audio", "decoder": "whisper", "lr": 1e-4, "frame_rate": 50},
            **{"audio_encoder_name": options["decoder_name"], "elayers": 0, "ctc_weight": 0.0},
            **{"train_file": train_file, "crop_size": clip, "use_qlora": False},
        }
        assert {name: options[name] for name in expected} == expected
        adaptation = train.parse_args([*words, *more, "--use-qlora"])[0].model.adaptation
        assert (adaptation.use_lora, adaptation.use_qlora) == (False, True)


@pytest.fixture(scope="module")
def with_decoder(arguments, tiny_checkpoints):
    """Command line of train.py for a pretrained decoder on the small ResNet of audio."""

    def of(name, decoder, *more):
        folder = str(tiny_checkpoints / decoder)
        words = ["--decoder", decoder, "--decoder-name", folder, "--max-epochs", "1", *more]
        return arguments(name, None, "resnet1d", *words)

    return of


@pytest.fixture(scope="module")
def whisper_run(with_decoder):
    """A run with Whisper's decoder over lists of SentencePiece ids."""
    more = ["--test-file", "test.csv", "--max-dec-tokens", "5"]
    train.main(with_decoder("whisper_decoder", "whisper", *more))
    return with_decoder("", "whisper"), Path(with_decoder("x", "whisper")[1]) / "whisper_decoder"


@pytest.mark.parametrize("normalize", ["none", "basic", "whisper"])
def test_a_pretrained_decoder_is_trained_and_scored(whisper_run, corpus, capsys, normalize):
    _, run_dir = whisper_run
    evaluation.main(
        [
            *["--pretrained-model-path", str(run_dir / "model_avg_10.pth"), "--num-workers", "0"],
            *["--root-dir", str(corpus), "--test-file", "test.csv", "--normalize", normalize],
            *["--output-dir", str(run_dir / normalize)],
        ]
    )
    assert f"normaliser {normalize}" in capsys.readouterr().out
    (summary,) = json.loads((run_dir / normalize / "summary.json").read_text())
    assert summary["normalize"] == normalize
    own, again = run_dir / "test", run_dir / normalize
    (lines,) = [(path / "hypotheses_audio_clean.jsonl").read_text() for path in (own,)]
    assert (again / "hypotheses_audio_clean.jsonl").read_text() == lines
    for line in map(json.loads, lines.splitlines()):
        assert line["reference"] == line["reference"].lower() != ""
        assert len(line["hypothesis"].split()) <= 5


@pytest.fixture
def published(tiny_checkpoints, corpus, tmp_path, monkeypatch):
    """Command line of eval.py for a Whisper without a run, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    words = ["--audio-encoder", "whisper", "--decoder", "whisper"]
    words += ["--decoder-name", str(tiny_checkpoints / "whisper"), "--num-workers", "0"]
    return [*words, "--root-dir", str(corpus), "--test-file", "test.csv", "--max-dec-tokens", "7"]


@pytest.mark.parametrize("margin", ["30s", "1"])
def test_a_published_whisper_is_scored_without_training(
    published, tiny_checkpoints, corpus, margin
):
    """What it writes is what transformers' generate gives, if it hears 30 s.

    A tiny random Whisper writes much the same whatever it hears, so scores are compared too.
    """
    evaluation.main([*published, "--whisper-margin", margin, "--length-normalization"])
    folder = Path("whisper_test_audio")
    lines = (folder / "hypotheses_audio_clean.jsonl").read_text().splitlines()
    ours = {line["id"]: line for line in map(json.loads, lines)}
    model = WhisperForConditionalGeneration.from_pretrained(tiny_checkpoints / "whisper").eval()
    transform = whisper_text_transform(
        str(tiny_checkpoints / "whisper"), language="en", task="transcribe", text_case="lower"
    )
    suppressed = {*model.generation_config.suppress_tokens, *transform.special_tokens}
    for name, line in ours.items():
        samples = read_audio(corpus / f"{name}.wav")
        mel = WhisperFeatureExtractor()(samples.numpy(), sampling_rate=16000, return_tensors="pt")
        found = model.generate(
            mel.input_features,
            decoder_input_ids=torch.tensor([transform.prompt]),
            num_beams=5,
            max_new_tokens=7,
            suppress_tokens=sorted(suppressed - {transform.eos - 1}),
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = [t + 1 for t in found.sequences[0].tolist() if t not in transform.prompt]
        if margin == "30s":
            assert line["hypothesis"] == transform.post_process(tokens)
        same = line["score"] == pytest.approx(float(found.sequences_scores), abs=1e-3)
        assert same == (margin == "30s")


def test_only_a_published_whisper_needs_no_checkpoint(published, capsys):
    error = error_of(capsys, evaluation, ["--decoder", "llama", *published[4:]])
    assert "--pretrained-model-path must be given: only a published Whisper" in error
    more = ["--elayers", "2", "--adim", "64", "--aheads", "4", "--ctc-weight", "0.3"]
    error = error_of(capsys, evaluation, [*published, *more])
    for flag in ("--elayers 2", "--adim 64", "--ctc-weight 0.3"):
        assert f"{flag} without --pretrained-model-path would score random weights" in error


def test_train_normalizes_what_it_scores(with_decoder):
    more = ["--test-file", "test.csv", "--max-dec-tokens", "3", "--normalize", "whisper"]
    train.main(with_decoder("normalized", "whisper", *more))
    run = Path(with_decoder("x", "whisper")[1]) / "normalized"
    (summary,) = json.loads((run / "test/summary.json").read_text())
    assert summary["normalize"] == "whisper"


def test_a_model_without_ctc_is_trained_and_takes_no_ctc_in_search(with_decoder, corpus, capsys):
    train.main(with_decoder("llama_decoder", "llama"))
    run_dir = Path(with_decoder("x", "llama")[1]) / "llama_decoder"
    header, *_ = (run_dir / "metrics.csv").read_text().splitlines()
    assert "loss_val" in header
    words = ["--pretrained-model-path", run_dir / "model_avg_10.pth", "--root-dir", corpus]
    words += ["--test-file", "test.csv", "--ctc-decode-weight", "0.3"]
    error = error_of(capsys, evaluation, words)
    assert "--ctc-decode-weight 0.3, but a model of --ctc-weight 0 has no CTC layer" in error


def test_a_language_model_without_bos_is_trained_scored_and_exported(
    arguments, corpus, tmp_path, capsys
):
    """The model that is exported writes the same."""
    folder = make_checkpoint(tmp_path / "qwen", "qwen2")
    words = ["--decoder", "llama", "--decoder-name", folder, "--max-epochs", "1", "--use-lora"]
    words += ["--test-file", "test.csv", "--max-dec-tokens", "5"]
    words = arguments("qwen", None, "resnet1d", *words)
    train.main(words)
    run = Path(words[1]) / "qwen"
    export.main([str(run), str(tmp_path / "out")])
    assert AutoConfig.from_pretrained(tmp_path / "out/decoder").model_type == "qwen2"
    shutil.rmtree(folder)  # The folder that is exported needs nothing beside it.
    places = ["--root-dir", str(corpus), "--output-dir", str(tmp_path / "scored")]
    words = ["--pretrained-model-path", str(tmp_path / "out/model.pth"), *places]
    evaluation.main([*words, "--test-file", "test.csv", "--num-workers", "0"])
    capsys.readouterr()
    first, second = (
        [
            json.loads(line)
            for line in (path / "hypotheses_audio_clean.jsonl").read_text().splitlines()
        ]
        for path in (run / "test", tmp_path / "scored")
    )
    assert any(line["hypothesis"] for line in first)
    assert [line["hypothesis"] for line in first] == [line["hypothesis"] for line in second]


def test_ids_without_their_vocabulary_are_refused(with_decoder, corpus, tmp_path, capsys):
    root = tmp_path / "elsewhere"
    (root / "labels").mkdir(parents=True)
    for name in ("train.csv", "val.csv"):
        (root / "labels" / name).write_text((corpus / "labels" / name).read_text())
    error = error_of(capsys, train, with_decoder("ids", "llama", "--root-dir", str(root)))
    assert "holds token ids, which are not those of the pretrained decoder: give their" in error


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        ("llama", ["--decoder-name", "WHISPER"], r"is a checkpoint of whisper, one of llama"),
        ("whisper", ["--decoder-name", "LLAMA"], r"is a checkpoint of llama, one of whisper"),
        ("whisper", ["--decoder-name", "NO_TOKENIZER"], r"has no tokenizer, looked for tokenizer"),
        (
            "whisper",
            ["--whisper-language", "xx"],
            r"knows no language 'xx', expected one of de, en",
        ),
        ("whisper", ["--whisper-gated-video"], r"needs a model of video and audio, got one of"),
        (
            "llama",
            ["--ctc-decode-weight", "0.1"],
            r"but a model of --ctc-weight 0 has no CTC layer",
        ),
        (
            "llama",
            ["--llama-conditioning", "prefix", "--decoder-name", "SHORT"],
            r"gives \d+ embeddings beside \d+ of the prompt, but .*SHORT has 8 positions: raise",
        ),
    ],
)
def test_mistakes_about_decoders_are_one_line(
    with_decoder, tiny_checkpoints, tmp_path, capsys, decoder, options, message
):
    shutil.copytree(tiny_checkpoints / "whisper", tmp_path / "NO_TOKENIZER")
    for path in (tmp_path / "NO_TOKENIZER").glob("*token*"):
        path.unlink()
    shutil.copytree(tiny_checkpoints / "llama", tmp_path / "SHORT")
    config = tmp_path / "SHORT/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 8}))
    names = {name.name.upper(): str(name) for name in tiny_checkpoints.iterdir()}
    names |= {name: str(tmp_path / name) for name in ("NO_TOKENIZER", "SHORT")}
    options = [names.get(word, word) for word in options]
    error = error_of(capsys, train, with_decoder("mistake", decoder, *options))
    assert re.search(message, error), error
    assert not (Path(with_decoder("x", "llama")[1]) / "mistake").exists()


def test_the_recipe_of_a_language_model(corpus, tiny_checkpoints, monkeypatch):
    monkeypatch.setattr(train, "make_corpus", lambda *_: None)
    words = ["--demo", "--recipe", "llama", "--root-dir", str(corpus), "--fast-dev-run"]
    words += ["--audio-encoder-name", str(tiny_checkpoints / "whisper"), "--num-workers", "0"]
    words += ["--decoder-name", str(tiny_checkpoints / "llama")]
    options = to_flat(train.parse_args(words)[0])
    expected = {
        **RECIPES["llama"].options,
        **{"modality": "audio", "ctc_weight": 0.2, "ctc_decode_weight": 0.0, "beam_size": 5},
        **{"qlora_parts": ("audio", "decoder"), "train_file": "train.csv", "frame_rate": 25},
    }
    assert {name: options[name] for name in expected} == expected
    train.main(words)


def test_ctc_is_trained_alone_at_first(with_decoder):
    words = with_decoder("ctc_first", "llama", "--llama-conditioning", "prefix")
    train.main([*words, "--llama-prefix-ctc", "--ctc-first-epochs", "1", "--max-epochs", "2"])
    with (Path(words[1]) / "ctc_first" / "metrics.csv").open() as file:
        first, second = csv.DictReader(file)
    assert float(first["loss_att"]) == 0 < float(first["loss_ctc"])
    assert float(second["loss_att"]) > 0
    assert float(first["loss_att_val"]) > 0  # Validation compares epochs by the whole loss.


def test_ctc_first_needs_ctc(with_decoder, capsys):
    words = with_decoder("mistake", "llama", "--ctc-first-epochs", "1")
    assert "but CTC has no share of the loss: give --ctc-weight" in error_of(capsys, train, words)


def test_a_prompt_without_a_prefix_is_refused(with_decoder, capsys):
    error = error_of(capsys, train, with_decoder("prompt", "llama", "--llama-prompt", "Write."))
    assert "needs --decoder llama --llama-conditioning prefix" in error
