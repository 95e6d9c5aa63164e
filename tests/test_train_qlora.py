"""The entry scripts with adapters: a run, its checkpoints, its scoring, mistakes."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from datamodule.loaders import model_inputs
from espnet.nets import adaptation
from espnet.nets.pytorch_backend.qlora_utils import parameter_report
from espnet.utils.building import build_data, build_model, build_text_transform
from espnet.utils.checkpoint import load_model, trained_content, transfer_weights
from tests.adapted_cases import adapters, changed, other_values, snapshot
from tests.tables import PRETRAINED
from tests.test_every_combination import module_of
from tests.test_train_and_eval import error_of, run_script, state_of

WIDE = ["--adim", "64", "--eunits", "64", "--dunits", "64"]


def flags(tiny_checkpoints, vision=None, audio=None, decoder=None):
    words = []
    for flag, name in (("--vision-encoder", vision), ("--audio-encoder", audio)):
        if name:
            words += [flag, name]
        if name in PRETRAINED:
            words += [f"{flag}-name", str(tiny_checkpoints / name)]
    if decoder:
        words += ["--decoder", decoder, "--decoder-name", str(tiny_checkpoints / decoder)]
    return words


@pytest.fixture(scope="module")
def arguments(train_arguments, tiny_checkpoints):
    """Command line of train.py for pretrained parts."""

    def of(name, parts, *more):
        words = [word for word in train_arguments(name, "") if word not in ("--modality", "")]
        return [*words, *flags(tiny_checkpoints, *parts), *more]

    of.exp_dir = train_arguments.exp_dir
    return of


FULL = ("clip", "whisper", "llama")
SMALL = (None, "whisper", None)
OF_FULL = ["--use-qlora", "--llama-cross-every", "2", "--lr-pretrained", "2e-3"]


@pytest.fixture(scope="module")
def run_dir(arguments):
    """An audio-visual run with QLoRA on CLIP, Whisper and LLaMA, trained and scored once."""
    more = ["--test-file", "test.csv", "--max-dec-tokens", "5"]
    train.main(arguments("qlora", FULL, *OF_FULL, *more))
    return arguments.exp_dir / "qlora"


def hypotheses(folder):
    (path,) = folder.glob("hypotheses_*.jsonl")
    return path.read_text()


def evaluate(checkpoint, corpus, output):
    evaluation.main(
        [
            *["--pretrained-model-path", str(checkpoint), "--root-dir", str(corpus)],
            *["--test-file", "test.csv", "--num-workers", "0", "--output-dir", str(output)],
        ]
    )
    return hypotheses(output)


def test_checkpoints_hold_adapters_and_new_parts(run_dir):
    content = state_of(run_dir / "last.ckpt")
    state = content["state_dict"]
    of_bases = {name for name in state if ".backbone." in name}
    assert all(".lora_" in name for name in of_bases)
    assert len(of_bases) == 2 * (2 * 6 + 2 * 6 + 4 * 7)
    assert not any(value.dtype == torch.uint8 for value in state.values())
    parts = {"video_frontend.backbone", "audio_frontend.backbone", "decoder.backbone"}
    assert (
        content["bases"].keys() == state_of(run_dir / "model_avg_10.pth")["bases"].keys() == parts
    )
    (optimizer,) = content["optimizer_states"]
    assert highest_rates(optimizer, 2e-3) == {1e-3, 2e-3}
    # All but the buffers of batch norms are trained.
    assert len(optimizer["state"]) == sum(
        "num_batches" not in n and "running" not in n for n in state
    )
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["qlora_parts"] == ["vision", "audio", "decoder"]
    assert {"peft", "bitsandbytes"} <= config["versions"].keys()


def test_eval_gives_the_runs_own_hypotheses(run_dir, corpus, tmp_path):
    assert evaluate(run_dir / "model_avg_10.pth", corpus, tmp_path) == hypotheses(run_dir / "test")


@pytest.mark.usefixtures("run_dir")
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(arguments, monkeypatch):
    words = arguments("resumed_qlora", FULL, *OF_FULL)

    def stop(module):
        if module.current_epoch == 1:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("lightning.ModelModule.on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            train.main([*words, "--debug"])
    train.main([*words, "--ckpt-path", "last"])
    one, two = (
        state_of(arguments.exp_dir / name / "last.ckpt") for name in ("qlora", "resumed_qlora")
    )
    assert one["global_step"] == two["global_step"]
    assert not changed(one["state_dict"], two["state_dict"])
    states = [content["optimizer_states"][0]["state"] for content in (one, two)]
    for first, second in zip(*(state.values() for state in states), strict=True):
        assert not changed(first, second)


@pytest.mark.parametrize(
    ("name", "parts", "more", "rates"),
    [
        ("lora_vit", ("vit", None, None), ["--use-lora", "--lora-rank", "2"], {1e-3}),
        (
            "unfrozen_whisper",
            (None, "whisper", None),
            ["--unfreeze-last-layers", "1", "--lr-pretrained", "1e-4"],
            {1e-3, 1e-4},
        ),
    ],
)
def test_other_ways_to_train(arguments, corpus, tmp_path, name, parts, more, rates):
    more = [*more, "--max-epochs", "1", "--test-file", "test.csv", "--max-dec-tokens", "5"]
    train.main(arguments(name, parts, *more))
    run = arguments.exp_dir / name
    content = state_of(run / "last.ckpt")
    assert all(value.isfinite().all() for value in content["state_dict"].values())
    (optimizer,) = content["optimizer_states"]
    assert highest_rates(optimizer, max(rates)) == rates
    assert evaluate(run / "model_avg_10.pth", corpus, tmp_path) == hypotheses(run / "test")


def highest_rates(optimizer, largest):
    """Rates of the groups of a saved optimiser, in proportion to the largest at its height."""
    rates = [group["lr"] for group in optimizer["param_groups"]]
    return {round(largest * rate / max(rates), 9) for rate in rates}


def tensors(state):
    """The tensors in nested dicts."""
    for value in state.values():
        yield from tensors(value) if isinstance(value, dict) else [value]


def test_moments_in_8_bits_are_resumed(arguments):
    more = ["--use-qlora", "--optimizer", "adamw8bit", "--adim", "64"]
    parts = (None, "wavlm", "whisper")
    train.main(arguments("straight8", parts, *more))
    path = arguments.exp_dir / "straight8/epoch=0.ckpt"
    train.main(arguments("resumed8", parts, *more, "--ckpt-path", str(path)))
    names = ("straight8", "resumed8")
    one, two = (state_of(arguments.exp_dir / name / "last.ckpt") for name in names)
    assert not changed(one["state_dict"], two["state_dict"])
    moments = [[*tensors(content["optimizer_states"][0]["state"])] for content in (one, two)]
    for first, second in zip(*moments, strict=True):
        assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    assert torch.uint8 in {value.dtype for value in moments[0] if torch.is_tensor(value)}


@pytest.fixture(scope="module")
def own_run(arguments):
    """An audio run without anything pretrained."""
    train.main(arguments("own", (None, "resnet1d", None), *WIDE, "--max-epochs", "1"))
    return arguments.exp_dir / "own"


def test_own_parts_are_adapted_from_a_checkpoint(own_run, arguments, corpus, tmp_path, capsys):
    """Quantised, they are saved: the fresh model of eval.py has others."""
    parts = ["--use-qlora", "--qlora-parts", "encoder", "decoder", "--max-epochs", "1"]
    parts += ["--test-file", "test.csv", "--max-dec-tokens", "5", "--seed", "7"]
    words = arguments("own_qlora", (None, "resnet1d", None), *WIDE, *parts)
    error = error_of(capsys, train, [*words, "--ckpt-path", "last"])  # There is none yet.
    assert "--qlora-parts encoder freezes weights that are random: give the checkpoint" in error
    assert "--qlora-parts decoder freezes weights that are random: give the checkpoint" in error
    train.main([*words, "--pretrained-model-path", str(own_run / "model_avg_10.pth")])
    run = arguments.exp_dir / "own_qlora"
    state = state_of(run / "model_avg_10.pth")
    assert any(value.dtype == torch.uint8 for value in state.values())
    assert any(".lora_" in name for name in state)
    assert evaluate(run / "model_avg_10.pth", corpus, tmp_path) == hypotheses(run / "test")
    train.main([*words, "--max-epochs", "2", "--ckpt-path", "last"])  # needs no other source


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed."""

    def remove(*packages):
        for package in packages:
            monkeypatch.delitem(installed, package)
        adaptation.INSTALLED.intersection_update(installed)

    installed = dict.fromkeys(adaptation.INSTALLED)
    before = set(adaptation.INSTALLED)
    yield remove
    adaptation.INSTALLED.update(before)


@pytest.mark.parametrize(
    ("missing", "more", "message"),
    [
        (
            "peft",
            ["--use-qlora"],
            '--use-qlora needs peft, but it is not installed: pip install -U "p',
        ),
        (
            "peft",
            ["--use-lora"],
            '--use-lora needs peft, but it is not installed: pip install -U "pe',
        ),
        (
            "bitsandbytes",
            ["--use-qlora"],
            "--use-qlora needs bitsandbytes, but it is not installed: ",
        ),
        (
            "bitsandbytes",
            ["--optimizer", "adamw8bit"],
            "--optimizer adamw8bit needs bitsandbytes, but it is not installed: pip install",
        ),
    ],
)
def test_missing_packages_are_one_line(arguments, without, capsys, missing, more, message):
    without(missing)
    error = error_of(capsys, train, arguments("missing", SMALL, *more))
    assert message in error
    assert not (arguments.exp_dir / "missing").exists()


@pytest.mark.parametrize("more", [["--use-qlora"], ["--optimizer", "adamw8bit"]])
def test_unusable_packages_are_one_line(arguments, monkeypatch, capsys, more):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # Importing it fails then.
    error = error_of(capsys, train, arguments("unusable", SMALL, *more))
    assert "needs bitsandbytes, but it cannot be imported (" in error
    assert 'pip install -U "bitsandbytes' in error


def test_what_does_not_need_the_packages_does_without(arguments, without):
    without("peft", "bitsandbytes")
    train.main(arguments("without_packages", SMALL, "--max-epochs", "1"))
    config = yaml.safe_load((arguments.exp_dir / "without_packages/config.yaml").read_text())
    assert {"peft", "bitsandbytes"}.isdisjoint(config["versions"])


def test_mistakes_of_a_command_line_are_one_line(arguments, capsys):
    more = ["--use-qlora", "--use-lora"]
    assert "contradict each other" in error_of(capsys, train, arguments("x", SMALL, *more))
    more = ["--use-qlora", "--no-freeze-audio-encoder"]
    assert "--no-freeze-audio-encoder contradicts --use-qlora" in error_of(
        capsys, train, arguments("x", SMALL, *more)
    )
    more = ["--use-qlora", "--lora-targets", "query"]
    error = error_of(capsys, train, arguments("x", SMALL, *more))
    assert "LoRA target query matches no linear layer of " in error
    assert ": choose among k_proj, v_proj, q_proj, out_proj, fc1, fc2\n" in error
    assert not (arguments.exp_dir / "x").exists()


def test_another_base_is_refused_for_scoring_and_resuming(
    run_dir, arguments, corpus, tmp_path, capsys
):
    name = yaml.safe_load((run_dir / "config.yaml").read_text())["audio_encoder_name"]
    other_values(Path(name), tmp_path / "other")
    error = error_of(
        capsys,
        evaluation,
        [
            *["--pretrained-model-path", run_dir / "model_avg_10.pth", "--root-dir", corpus],
            *["--test-file", "test.csv", "--audio-encoder-name", tmp_path / "other"],
        ],
    )
    assert "as audio_frontend.backbone, but the model has" in error
    words = arguments("refused", FULL, *OF_FULL, "--ckpt-path", str(run_dir / "last.ckpt"))
    error = error_of(capsys, train, [*words, "--audio-encoder-name", tmp_path / "other"])
    assert "as audio_frontend.backbone, but the model has" in error
    assert not (arguments.exp_dir / "refused").exists()


@pytest.fixture
def surer(tiny_checkpoints, tmp_path):
    """The tiny checkpoints with output layers that can be sure of a word though they are frozen."""
    folder = shutil.copytree(tiny_checkpoints, tmp_path / "tiny")
    generator = torch.Generator().manual_seed(0)
    for name in ("llama", "whisper"):
        path = folder / name / "model.safetensors"
        weights = load_file(path)
        for entry, weight in weights.items():
            if "embed_tokens" in entry:  # Whisper's has zeros for the end, where it is padding.
                weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
        save_file(weights, path, metadata={"format": "pt"})
    return folder


BY_HEART = {
    "transformer": ["--dunits", "64", "--dlayers", "1"],
    "llama": ["--llama-cross-every", "2"],
    "llama_prefix": ["--llama-conditioning", "prefix"],
    "whisper": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("decoder", BY_HEART)
def test_four_utterances_are_overfitted(corpus, surer, tmp_path, decoder):
    pretrained = None if decoder == "transformer" else decoder.split("_")[0]
    options, _ = train.parse_args(
        [
            *["--exp-name", "x", "--root-dir", str(corpus), "--train-file", "train.csv"],
            *["--val-file", "val.csv", "--num-workers", "0", "--crop-size", "48", "--adim", "64"],
            *["--aheads", "4", "--eunits", "64", "--elayers", "1", "--cnn-module-kernel", "7"],
            *["--dropout-rate", "0", "--lora-dropout", "0", "--beam-size", "3", "--use-qlora"],
            # CTC tells the encoder early what distinguishes the utterances.
            *["--ctc-weight", "0.3", *BY_HEART[decoder]],
            *flags(surer, "clip", "whisper", pretrained),
        ]
    )
    transform = build_text_transform(options.model.decoder, options.data)
    data = build_data(options, options.model.encoders.modality, transform)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    torch.manual_seed(0)
    module = module_of(options, transform)
    model = module.model
    before = snapshot(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameter_report(model).trainable == sum(p.numel() for p in trained.values())
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3, weight_decay=0.0)
    expected = [transform.post_process(row) for row in batch["targets"]]
    found = []
    for step in range(400):
        loss = model(*model_inputs(batch), batch["targets"])[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 5.0)
        optimizer.step()
        if step % 20 == 19 and loss < 3:
            module.eval()
            found = [result.hypothesis for result in module.decode(batch)]
            module.train()
            if found == expected:
                break
    assert found == expected, (step, loss)
    print(f"{decoder}: overfitted after {step + 1} steps")
    buffers = {name for name, _ in model.named_buffers()}
    assert changed(before, model.state_dict()) <= trained.keys() | buffers
    assert adapters(model).keys() <= changed(before, model.state_dict())

    module.eval()
    results = module.decode(batch)
    torch.save(trained_content(model), tmp_path / "model.pth")
    torch.manual_seed(1)
    fresh = module_of(options, transform).eval()
    load_model(fresh.model, tmp_path / "model.pth")
    for one, two in zip(results, fresh.decode(batch), strict=True):
        assert one.hypothesis == two.hypothesis
        assert one.score == two.score


@pytest.mark.slow
def test_two_processes_train_adapters(arguments, own_run):
    words = ["--gpus", "2", "--test-file", "test.csv", "--max-dec-tokens", "5", "--max-epochs", "1"]
    done = run_script("train.py", arguments("qlora_pair", FULL, *OF_FULL, *words))
    assert done.returncode == 0, done.stderr
    state = state_of(arguments.exp_dir / "qlora_pair/last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    assert any(value.any() for name, value in state.items() if "lora_B" in name)
    assert not any(".backbone." in name and ".lora_" not in name for name in state)

    # Weights in 4 bits that the checkpoint holds, of the project's own encoder.
    path = own_run / "model_avg_10.pth"
    words = ["--gpus", "2", "--max-epochs", "1", "--use-qlora", "--qlora-parts", "encoder", *WIDE]
    words = arguments("own_pair", (None, "resnet1d", None), *words)
    done = run_script("train.py", [*words, "--pretrained-model-path", str(path)])
    assert done.returncode == 0, done.stderr
    state = state_of(arguments.exp_dir / "own_pair/last.ckpt")["state_dict"]
    options, _ = train.parse_args([*words, "--pretrained-model-path", str(path)])
    model = build_model(options.model, build_text_transform(options.model.decoder, options.data))
    transfer_weights(model, path)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: v for n, v in model.state_dict().items() if n.startswith("encoder.")}
    before = {name: value for name, value in before.items() if name not in trained}
    assert any(value.dtype == torch.uint8 for value in before.values())
    assert any("running_mean" in name for name in before)
    assert not changed(before, {name: state[f"model.{name}"] for name in before})
