"""Export of runs with adapters: merged, in full precision, with all that they load."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    ViTModel,
    WavLMModel,
    WhisperFeatureExtractor,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import eval as evaluation
import train
from espnet.utils import export
from espnet.utils.building import build_model, build_text_transform
from espnet.utils.checkpoint import load_model, read_state_dict
from espnet.utils.options import eval_parser
from espnet.utils.run_config import completed, parse_eval_args
from tests.test_train_and_eval import error_of

WIDE = ["--adim", "64", "--eunits", "64", "--dunits", "64", "--max-dec-tokens", "5"]
QLORA = ["--use-qlora", "--lr-pretrained", "3e-2", "--warmup-epochs", "0"]
RUNS = {
    "clip_whisper_llama": (
        {"vision_encoder": "clip", "audio_encoder": "whisper", "decoder": "llama"},
        {
            "vision_encoder": CLIPVisionModel,
            "audio_encoder": WhisperEncoder,
            "decoder": LlamaForCausalLM,
        },
        [*QLORA, "--llama-cross-every", "2", "--length-bonus", "10"],
    ),
    "first_layers": (
        {"vision_encoder": "vit", "audio_encoder": "wavlm", "decoder": "whisper"},
        {"vision_encoder": ViTModel, "audio_encoder": WavLMModel, "decoder": WhisperForCausalLM},
        [*QLORA, "--encoder-layer", "1", "--whisper-gated-video"],
    ),
    "lora": (
        {"audio_encoder": "whisper"},
        {"audio_encoder": WhisperEncoder},
        ["--use-lora", "--lr-pretrained", "3e-2", "--warmup-epochs", "0"],
    ),
    "everywhere": (  # but for the output layer, whose weight is the embeddings'
        {"audio_encoder": "whisper", "decoder": "whisper"},
        {"audio_encoder": WhisperEncoder, "decoder": WhisperForCausalLM},
        ["--use-lora", "--lora-targets", "*", "--lr-pretrained", "1e-1", "--warmup-epochs", "0"],
    ),
    "whisper_alone": (
        {"audio_encoder": "whisper", "decoder": "whisper"},
        {"audio_encoder": WhisperEncoder, "decoder": WhisperForCausalLM},
        ["--use-lora", "--elayers", "0", "--lr-pretrained", "3e-2", "--warmup-epochs", "0"],
    ),
}


def folder_of(name, part):
    """Folder in which an exported run keeps a part."""
    parts, *_ = RUNS[name]
    one = part != "vision_encoder" and parts.get("decoder") == parts["audio_encoder"] == "whisper"
    return "whisper" if one else part


@pytest.fixture(scope="module")
def exported(train_arguments, tiny_checkpoints, tmp_path_factory):
    """Trains and exports a run, once each; its checkpoints are then gone."""
    done = {}

    def of(name):
        if name not in done:
            parts, _, more = RUNS[name]
            root = tmp_path_factory.mktemp(name)
            words = [
                word
                for word in train_arguments(f"exported_{name}", "")
                if word not in ("--modality", "")
            ]
            for part, kind in parts.items():
                flag = f"--{part.replace('_', '-')}"
                if not (root / kind).exists():
                    shutil.copytree(tiny_checkpoints / kind, root / kind)
                    (root / kind / "chat_template.jinja").write_text("{{ messages }}")
                words += [flag, kind, f"{flag}-name", str(root / kind)]
            words += ["--test-file", "test.csv", "--max-epochs", "1"]
            train.main([*words, *WIDE, *more])
            run, out = train_arguments.exp_dir / f"exported_{name}", root / "out"
            adapted, without, inputs = outputs_of(run / "model_avg_10.pth")
            for one, two in zip(adapted, without, strict=True):  # else the tests would show little
                assert (one - two).abs().max() > 0.02
            export.main([str(run), str(out)])
            for kind in set(parts.values()):
                shutil.rmtree(root / kind)
            done[name] = run, out, adapted, inputs
        return done[name]

    return of


def build(words):
    """The model that eval.py builds for a command line, and its vocabulary."""
    options, _ = parse_eval_args(eval_parser(), words)
    options = completed(options)
    transform = build_text_transform(options.model.decoder, options.data)
    return build_model(options.model, transform), transform


def load(path):
    """The model of a checkpoint as eval.py builds it."""
    words = ["--pretrained-model-path", str(path), "--root-dir", str(path.parent)]
    model, _ = build(words)
    load_model(model, path)
    return model.eval()


@torch.no_grad()
def run_model(model, inputs):
    x, lengths, targets = inputs
    encoded = model.encode(x, lengths)
    loss, _, loss_att, _ = model.losses(encoded, targets)
    return [encoded.memory, loss, loss_att]


def outputs_of(path):
    """What the model of a checkpoint gives, with and without adapters, for which inputs."""
    model = load(path)
    generator = torch.Generator().manual_seed(1)
    x = {
        "video": torch.randn(2, 7, 1, 32, 32, generator=generator),
        "audio": torch.randn(2, 640 * 7, 1, generator=generator),
    }
    lengths = {"video": torch.tensor([7, 5]), "audio": 640 * torch.tensor([7, 5])}
    x, lengths = ({s: values[s] for s in model.streams} for values in (x, lengths))
    inputs = (x, lengths, torch.tensor([[5, 9, 7], [8, -1, -1]]))
    adapted = run_model(model, inputs)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return adapted, run_model(model, inputs), inputs


@pytest.mark.parametrize("name", RUNS)
def test_the_exported_model_is_the_adapted_one_without_adapters(exported, name):
    _, out, adapted, inputs = exported(name)
    parts, _, _ = RUNS[name]
    model = load(out / "model.pth")
    state = model.state_dict()
    assert not any(".lora_" in entry or "base_layer" in entry for entry in state)
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    # Merged, sums are taken in another order, through a few layers.
    found = run_model(model, inputs)
    if name == "whisper_alone":  # The projection of its memory has gone into the decoder.
        found, adapted = found[1:], adapted[1:]
    torch.testing.assert_close(found, adapted, rtol=1e-3, atol=1e-3)
    saved = read_state_dict(out / "model.pth")
    assert not any(".backbone." in entry for entry in saved)
    bases = torch.load(out / "model.pth", weights_only=True)["bases"]
    folders = {str(out / folder_of(name, part)) for part in parts}
    assert {base["name"] for base in bases.values()} == folders


@pytest.mark.parametrize("name", RUNS)
def test_eval_gives_the_runs_own_hypotheses(exported, corpus, name):
    run, out, *_ = exported(name)
    words = ["--root-dir", str(corpus), "--test-file", "test.csv", "--num-workers", "0"]
    evaluation.main(["--pretrained-model-path", str(out / "model.pth"), *words])
    (found,) = out.glob("model_test_*/hypotheses_*.jsonl")
    texts = [
        [json.loads(line)["hypothesis"] for line in path.read_text().splitlines()]
        for path in (found, next((run / "test").glob("hypotheses_*.jsonl")))
    ]
    assert texts[0] == texts[1]
    assert any(texts[0])


@pytest.mark.parametrize("name", RUNS)
def test_folders_load_with_transformers(exported, name):
    _, out, *_ = exported(name)
    parts, classes, _ = RUNS[name]
    model = load(out / "model.pth")
    modules = {"vision_encoder": "video_frontend", "audio_encoder": "audio_frontend"}
    for part, kind in classes.items():
        options = {"add_pooling_layer": False} if kind is ViTModel else {}  # It is not in use.
        folder, prefix = out / folder_of(name, part), ""
        if folder.name == "whisper":  # a whole one
            prefix = "model.encoder." if kind is WhisperEncoder else ""
            kind = WhisperForConditionalGeneration
        theirs, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        ours = model.get_submodule(f"{modules.get(part, part)}.backbone").state_dict()
        values = theirs.state_dict()
        for entry, value in ours.items():
            torch.testing.assert_close(value, values[prefix + entry], rtol=0, atol=0)
    if parts.get("decoder"):
        folder = out / folder_of(name, "decoder")
        assert len(AutoTokenizer.from_pretrained(folder)) > 300
        assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"


@torch.no_grad()
def test_a_finetuned_whisper_is_exported_as_one_whisper(exported):
    """With the projection between encoder and decoder, which training has changed, folded in."""
    run, out, *_ = exported("whisper_alone")
    theirs, report = WhisperForConditionalGeneration.from_pretrained(
        out / "whisper", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {path.name for path in out.iterdir() if "test" not in path.name} == {
        *("config.yaml", "model.pth", "unigram.model", "unigram_units.txt", "whisper")
    }
    extractor = WhisperFeatureExtractor.from_pretrained(out / "whisper")
    wave = 0.1 * torch.randn(16_000, generator=torch.Generator().manual_seed(2))
    mel = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    trained = read_state_dict(run / "model_avg_10.pth")["proj_encoder.weight"]
    assert (trained - torch.eye(64)).abs().max() > 1e-3
    words = ["--pretrained-model-path", str(out / "model.pth"), "--root-dir", str(out)]
    model, transform = build([*words, "--whisper-margin", "30s"])
    model.eval()
    load_model(model, out / "model.pth")
    tokens = torch.tensor([[model.sos, 9, 40, 7]])
    encoded = model.encode(wave[None, :, None], torch.tensor([16_000]))
    ids = torch.cat([torch.tensor([transform.prompt[:-1]]), tokens - 1], dim=1)
    expected = theirs(mel, decoder_input_ids=ids).logits[:, len(transform.prompt) - 1 :]
    torch.testing.assert_close(model.decoder(tokens, *encoded[:2]), expected, rtol=1e-3, atol=1e-3)


def test_layers_that_are_not_used_are_exported_as_they_were(exported, tiny_checkpoints):
    _, out, *_ = exported("first_layers")
    original = ViTModel.from_pretrained(tiny_checkpoints / "vit").state_dict()
    whole = ViTModel.from_pretrained(out / "vision_encoder", add_pooling_layer=False).state_dict()
    assert whole.keys() == {entry for entry in original if "pooler" not in entry}
    for entry in whole:
        if entry.startswith("layers.1."):
            torch.testing.assert_close(whole[entry], original[entry], rtol=0, atol=0)
    assert not torch.equal(*(s["layers.0.mlp.fc1.weight"] for s in (whole, original)))


def test_the_config_names_the_folders_and_no_adapters(exported):
    _, out, *_ = exported("clip_whisper_llama")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["vision_encoder_name"], config["decoder_name"]) == ("vision_encoder", "decoder")
    assert not config["use_qlora"]
    assert {"root_dir", "exp_dir", "pretrained_model_path"}.isdisjoint(config)
    assert config["qlora_parts"] is None
    assert str(out) not in (out / "config.yaml").read_text()
    names = {"audio_encoder", "config.yaml", "decoder", "model.pth", "vision_encoder"}
    assert {path.name for path in out.iterdir() if "test" not in path.name} >= names


def test_an_exported_model_may_be_moved_and_trained_on(exported, train_arguments, tmp_path):
    _, out, adapted, inputs = exported("lora")
    moved = shutil.copytree(out, tmp_path / "moved")
    for folder in moved.glob("model_test_*"):
        shutil.rmtree(folder)
    torch.testing.assert_close(
        run_model(load(moved / "model.pth"), inputs), adapted, rtol=1e-3, atol=1e-3
    )
    words = [word for word in train_arguments("on", "") if word not in ("--modality", "")]
    words += ["--audio-encoder", "whisper", "--audio-encoder-name", str(moved / "audio_encoder")]
    words += [*WIDE, "--use-qlora", "--fast-dev-run"]
    train.main([*words, "--pretrained-model-path", str(moved / "model.pth")])


@pytest.fixture(scope="module")
def own_run(train_arguments):
    """A run with QLoRA on the project's own Conformer and decoder, from a run without."""
    more = [*WIDE, "--max-epochs", "1", "--test-file", "test.csv"]
    train.main(train_arguments("plain_first", "audio", *more))
    first = train_arguments.exp_dir / "plain_first/model_avg_10.pth"
    more += [*QLORA, "--qlora-parts", "encoder", "decoder", "--pretrained-model-path", str(first)]
    train.main(train_arguments("own_adapted", "audio", *more))
    return train_arguments.exp_dir / "own_adapted"


def test_own_parts_are_exported(own_run, corpus, tmp_path):
    adapted, without, inputs = outputs_of(own_run / "model_avg_10.pth")
    assert (adapted[0] - without[0]).abs().max() > 0.02
    export.main([str(own_run / "model_avg_10.pth"), str(tmp_path / "out")])
    model = load(tmp_path / "out/model.pth")
    plain = torch.load(own_run.parent / "plain_first/model_avg_10.pth", weights_only=True)
    state = torch.load(tmp_path / "out/model.pth", weights_only=True)
    assert {n: (v.shape, v.dtype) for n, v in state.items()} == {
        n: (v.shape, v.dtype) for n, v in plain.items()
    }
    torch.testing.assert_close(run_model(model, inputs), adapted, rtol=1e-3, atol=1e-3)
    words = ["--root-dir", str(corpus), "--test-file", "test.csv", "--num-workers", "0"]
    evaluation.main(["--pretrained-model-path", str(tmp_path / "out/model.pth"), *words])
    (found,) = (tmp_path / "out").glob("model_test_*/hypotheses_*.jsonl")
    lines = [json.loads(line)["hypothesis"] for line in found.read_text().splitlines()]
    (own,) = (own_run / "test").glob("hypotheses_*.jsonl")
    assert lines == [json.loads(line)["hypothesis"] for line in own.read_text().splitlines()]


def test_mistakes_are_one_line(own_run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("here")
    cases = [
        (own_run, tmp_path / "full", r"full exists: give a new or an empty folder to write to"),
        (own_run, tmp_path / "full/file", r"file exists: give a new or an empty folder"),
        (tmp_path / "gone", tmp_path / "out", r"gone does not exist: give the folder of a run, or"),
        (tmp_path / "full", tmp_path / "out", r"holds no model_avg_N.pth: name one of its checkp"),
        (own_run / "metrics.csv", tmp_path / "out", r"metrics.csv (cannot be read|is not loaded)"),
    ]
    for run, out, message in cases:
        error = error_of(capsys, export, [run, out])
        assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
    assert Path(tmp_path / "full/file").read_text() == "here"
