import pickle

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.pytorch_backend.qlora_utils import quantize_4bit
from espnet.utils.checkpoint import (
    average_checkpoints,
    load_model,
    load_weights,
    read_checkpoint,
    read_state_dict,
    trained_content,
    transfer_weights,
)
from tests import adapted_cases
from tests.adapted_cases import assert_same, changed, disturb, other_values, outputs
from tests.auto_avsr_cases import CASES, build, fill

SIZES = {"adim": 8, "aheads": 2, "eunits": 8, "elayers": 1, "dunits": 8, "dlayers": 1}


def make(modality="audio", odim=7, **options):
    return E2E.from_keywords(odim, modality, video_width=2, audio_width=2, **{**SIZES, **options})


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator))
    return model


def same(module, other):
    pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_code_is_never_unpickled(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"weight": torch.ones(2), "extra": Evil()}, path)
    with pytest.raises(
        ValueError, match=r"evil.pth is not loaded, since it holds more than"
    ) as info:
        read_checkpoint(path)
    assert "unpickled" not in capsys.readouterr().out
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no checkpoint at all", "damaged or no PyTorch checkpoint|holds more than"),
        (b"", "damaged or no PyTorch checkpoint"),
        (pickle.dumps([1, 2], protocol=2), "damaged or no PyTorch checkpoint|holds more than"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        read_checkpoint(path)
    assert "\n" not in str(info.value)


def test_missing_and_empty_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r"gone.pth does not exist: check the path"):
        read_checkpoint(tmp_path / "gone.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, a state dict is expected"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        read_state_dict(tmp_path / "empty.pth")


def test_a_truncated_checkpoint_is_damaged(tmp_path):
    torch.save(make().state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half.pth cannot be read \(.*damaged"):
        read_checkpoint(tmp_path / "half.pth")


def test_lightning_checkpoints_and_plain_state_dicts_are_read_alike(tmp_path):
    model = randomise(make(), 0)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    wrapped = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 1}, tmp_path / "run.ckpt")
    for name in ("plain.pth", "run.ckpt"):
        other = make()
        load_weights(other, read_state_dict(tmp_path / name), name)
        assert same(model, other)


def test_mismatches_are_named_with_their_shapes():
    state = make(odim=9).state_dict()
    with pytest.raises(
        ValueError,
        match=r"nine.pth does not fit the model: decoder.embed.0.weight is \(9, 8\), not \(7, 8\); "
        r".* and 2 more: give the model options and the vocabulary",
    ):
        load_weights(make(), state, "nine.pth")
    state = make().state_dict()
    state["surplus"] = state.pop("proj_encoder.bias")
    with pytest.raises(ValueError, match=r"proj_encoder.bias is missing; surplus is unknown:"):
        load_weights(make(), state, "odd.pth")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["modality"])
def test_auto_avsr_state_dicts_load(tmp_path, case):
    path = tmp_path / "published.pth"
    torch.save(fill(case["state_dict"]), path)
    model, reference = build(case), build(case)
    randomise(model, 1)
    load_weights(model, read_state_dict(path), path)
    assert same(model, reference)


def test_transfer_of_the_whole_model(tmp_path):
    torch.save(randomise(make(), 0).state_dict(), tmp_path / "model.pth")
    model = make()
    transfer_weights(model, tmp_path / "model.pth")
    assert same(model, randomise(make(), 0))


def test_transfer_of_parts(tmp_path):
    source = randomise(make("video"), 0)
    torch.save(source.state_dict(), tmp_path / "video.pth")
    model = make("audiovisual")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transfer_weights(model, tmp_path / "video.pth", frontend=True)
    assert same(model.video_frontend, source.video_frontend)
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("video_frontend.")}
    assert all(torch.equal(value, before[name]) for name, value in rest.items())
    transfer_weights(model, tmp_path / "video.pth", encoder=True)
    assert same(model.encoder, source.encoder)


def entries(table):
    """The numbers of a table by part: taken, and of how many."""
    rows = (line.split() for line in table.splitlines()[1:])
    return {part: (int(taken), int(of)) for part, taken, _, of, _ in rows}


def taken_parts(model, source):
    own, other = model.state_dict(), source.state_dict()
    names = {name.split(".")[0] for name in own}
    return {
        part
        for part in names
        if all(torch.equal(v, other[n]) for n, v in own.items() if n.split(".")[0] == part)
    }


def test_no_random_layer_stays_between_front_end_and_encoder(tmp_path):
    more = {"modality_dropout": (0.2, 0.2)}
    source = randomise(make("audiovisual", odim=9, **more), 0)
    torch.save(source.state_dict(), tmp_path / "nine.pth")
    model = randomise(make("audiovisual", **more), 1)
    table = transfer_weights(model, tmp_path / "nine.pth", frontend=True, encoder=True)
    between = {"proj_encoder", "missing_video", "missing_audio"}
    assert taken_parts(model, source) == {"video_frontend", "audio_frontend", "encoder", *between}
    counts = entries(table)
    assert counts["proj_encoder"] == (2, 2)
    assert counts["encoder"] == (len(source.encoder.state_dict()),) * 2
    assert counts["decoder"] == (0, len(model.decoder.state_dict()))
    assert sum(of for _, of in counts.values()) == len(model.state_dict())


def test_a_projection_that_does_not_fit_stays(tmp_path):
    source = randomise(make("audio"), 0)
    torch.save(source.state_dict(), tmp_path / "audio.pth")
    model = make("audiovisual")
    before = model.proj_encoder.weight.clone()
    table = transfer_weights(model, tmp_path / "audio.pth", frontend=True, encoder=True)
    assert torch.equal(model.proj_encoder.weight, before)
    assert entries(table)["proj_encoder"] == (0, 2)
    assert entries(table)["video_frontend"][0] == 0


def test_transfer_of_all_but_the_vocabulary(tmp_path):
    source = randomise(make(odim=9), 0)
    torch.save(source.state_dict(), tmp_path / "nine.pth")
    model = randomise(make(), 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = transfer_weights(model, tmp_path / "nine.pth", everything=True)
    of_vocabulary = {name for name, value in before.items() if 7 in value.shape}
    assert len(of_vocabulary) == 5
    for name, value in model.state_dict().items():
        expected = before if name in of_vocabulary else source.state_dict()
        assert torch.equal(value, expected[name]), name
    counts = entries(table)
    assert counts["ctc"] == (0, 2)
    assert sum(taken for taken, _ in counts.values()) == len(before) - 5


def test_transfer_of_a_word_classifiers_frontend(tmp_path):
    """Bare names under `model_state_dict`, with a classifier that is left out."""
    source = randomise(make("video"), 0)
    state = source.video_frontend.state_dict()
    content = {"model_state_dict": {**state, "tcn.weight": torch.ones(3)}}
    torch.save(content, tmp_path / "lrw.pth")
    model = make("video")
    transfer_weights(model, tmp_path / "lrw.pth", frontend=True)
    assert same(model.video_frontend, source.video_frontend)


def test_transfer_from_a_checkpoint_without_the_part(tmp_path):
    torch.save(make("video").state_dict(), tmp_path / "video.pth")
    with pytest.raises(ValueError, match="has no weights for video_frontend or audio_frontend"):
        transfer_weights(make("audio"), tmp_path / "video.pth", frontend=True)


def test_average_is_the_mean_of_weights_and_the_last_of_counters(tmp_path):
    paths, models = [], []
    for number in range(3):
        model = randomise(make(), number)
        for name, value in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(10 * number)
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        paths.append(tmp_path / f"epoch={number}.ckpt")
        torch.save({"state_dict": state}, paths[-1])
        models.append(model.state_dict())
    average = average_checkpoints(paths)
    assert average.keys() == models[0].keys()
    for name, value in average.items():
        assert value.dtype == models[0][name].dtype
        if value.is_floating_point():
            expected = torch.stack([model[name] for model in models]).mean(dim=0)
            torch.testing.assert_close(value, expected)
        else:
            assert value.item() == 20


KINDS = [*((case, "use_qlora") for case in adapted_cases.CASES), ("clip_whisper_llama", "use_lora")]
KINDS += [("own_encoder", "use_lora")]


def of_base(name, model):
    """Whether a name in the state dict is of a checkpoint's weights, as they were."""
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    return ".backbone." in name and name not in trained


@pytest.mark.parametrize(("case", "how"), KINDS)
def test_what_was_trained_comes_back_on_the_same_bases(tiny_checkpoints, tmp_path, case, how):
    model = disturb(adapted_cases.make(tiny_checkpoints, case, **{how: True}))
    model.train()(*adapted_cases.batch(model))  # which moves batch statistics
    expected = outputs(model)
    torch.save(trained_content(model), tmp_path / "model.pth")
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    state = model.state_dict()
    kept = {name for name in state if not of_base(name, model)}
    if case == "own_parts":
        assert content.keys() == kept == state.keys()
    else:
        assert content["model_state_dict"].keys() == kept
        assert {*content["bases"]} == {n[:-1] for n in _bases_of(case)}
        # The file is that of an own Conformer and adapters: 20 kB are names and layout.
        size = sum(state[name].nbytes for name in kept)
        assert (tmp_path / "model.pth").stat().st_size < size + 500 * len(kept)
        left_out = sum(value.nbytes for name, value in state.items() if name not in kept)
        assert left_out > 80_000
    fresh = adapted_cases.make(tiny_checkpoints, case, **{how: True})
    assert changed(state, fresh.state_dict()) <= kept
    load_model(fresh, tmp_path / "model.pth")
    assert_same(outputs(fresh), expected)
    assert not changed(state, fresh.state_dict())


def _bases_of(case):
    names = (*adapted_cases.ADAPTED[case], *adapted_cases.FROZEN.get(case, ()))
    return {name for name in names if "backbone" in name}


def resized(source, target):
    """A checkpoint of the same kind with other shapes."""
    config = AutoConfig.from_pretrained(source)
    config.intermediate_size = 192
    LlamaForCausalLM(config).save_pretrained(target)


PARTS = {
    "vision_encoder_name": ("video_frontend.backbone", "clip"),
    "audio_encoder_name": ("audio_frontend.backbone", "whisper"),
    "decoder_name": ("decoder.backbone", "llama"),
}


@pytest.mark.parametrize("how", ["use_qlora", "use_lora"])
@pytest.mark.parametrize(
    ("flag", "change"), [*((flag, other_values) for flag in PARTS), ("decoder_name", resized)]
)
def test_other_bases_are_refused(tiny_checkpoints, tmp_path, how, flag, change):
    part, name = PARTS[flag]
    change(tiny_checkpoints / name, tmp_path / "other")
    model = adapted_cases.make(tiny_checkpoints, "clip_whisper_llama", **{how: True})
    options = {how: True, flag: str(tmp_path / "other")}
    other = adapted_cases.make(tiny_checkpoints, "clip_whisper_llama", **options)
    torch.save(trained_content(model), tmp_path / "model.pth")
    one, two = (m.get_submodule(part).base.fingerprint for m in (model, other))
    assert one != two
    before = adapted_cases.snapshot(other)
    for load in (load_model, transfer_weights):
        with pytest.raises(
            ValueError,
            match=rf"model.pth was trained on .*/{name} \(fingerprint {one}\) as {part}, but the "
            rf"model has .*/other \(fingerprint {two}\): give the one that it was trained on$",
        ):
            load(other, tmp_path / "model.pth")
    assert not changed(before, other.state_dict())


def test_a_front_end_of_another_base_is_refused(tiny_checkpoints, tmp_path):
    other_values(tiny_checkpoints / "clip", tmp_path / "other")
    model = adapted_cases.make(tiny_checkpoints, "own_parts", use_lora=True, **CLIP_ALONE)
    torch.save(trained_content(model), tmp_path / "model.pth")
    options = {**CLIP_ALONE, "use_lora": True, "vision_encoder_name": str(tmp_path / "other")}
    other = adapted_cases.make(tiny_checkpoints, "own_parts", **options)
    with pytest.raises(ValueError, match="as video_frontend.backbone, but the model has"):
        transfer_weights(other, tmp_path / "model.pth", frontend=True)
    transfer_weights(other, tmp_path / "model.pth", encoder=True)  # has no base


CLIP_ALONE = {"vision_encoder": "clip", "qlora_parts": ("vision",)}


@pytest.mark.parametrize("case", ["clip_whisper_llama", "own_encoder"])
def test_the_average_of_adapted_models(tiny_checkpoints, tmp_path, case):
    states, paths = [], []
    for seed in range(3):
        model = disturb(adapted_cases.make(tiny_checkpoints, case, use_qlora=True), seed)
        states.append(trained_content(model)["model_state_dict"])
        content = trained_content(model)
        wrapped = {f"model.{name}": value for name, value in states[-1].items()}
        paths.append(tmp_path / f"epoch={seed}.ckpt")
        torch.save({"state_dict": wrapped, "bases": content["bases"]}, paths[-1])
    average = average_checkpoints(paths)
    assert average["bases"] == content["bases"]
    in_bits = 0
    for name, value in average["model_state_dict"].items():
        values = [state[name] for state in states]
        if value.dtype == torch.uint8:
            assert all(torch.equal(value, other) for other in values)
            in_bits += 1
        elif value.is_floating_point():
            torch.testing.assert_close(value, torch.stack(values).mean(dim=0))
    assert bool(in_bits) == (case == "own_encoder")
    torch.save(average, tmp_path / "average.pth")
    model = adapted_cases.make(tiny_checkpoints, case, use_qlora=True)
    before = adapted_cases.snapshot(model)
    load_model(model, tmp_path / "average.pth")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert not changed(before, model.state_dict()) & frozen


@pytest.mark.parametrize("auto_avsr", [False, True])
@pytest.mark.parametrize("parts", [{}, {"encoder": True}, {"frontend": True, "encoder": True}])
def test_transfer_into_adapted_parts_is_transfer_and_then_quantisation(
    tiny_checkpoints, tmp_path, parts, auto_avsr
):
    source = adapted_cases.make(tiny_checkpoints, "own_parts")
    state = randomise_weights(source).state_dict()
    if auto_avsr:
        state = {n.replace("video_frontend.", "frontend."): value for n, value in state.items()}
    torch.save(state, tmp_path / "source.pth")
    expected = adapted_cases.make(tiny_checkpoints, "own_parts")
    transfer_weights(expected, tmp_path / "source.pth", **parts)
    for part in ("encoder", "decoder"):
        quantize_4bit(expected.get_submodule(part))
    model = adapted_cases.make(tiny_checkpoints, "own_parts", use_qlora=True)
    transfer_weights(model, tmp_path / "source.pth", **parts)
    assert_same(outputs(model), outputs(expected))
    state = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    state = {name: value for name, value in state.items() if ".lora_" not in name}
    assert not changed(expected.state_dict(), state)
    assert not any(p.requires_grad for p in model.encoder.parameters() if p.dtype == torch.uint8)
    with_adapters = disturb(model)
    torch.save(trained_content(with_adapters), tmp_path / "adapted.pth")
    again = adapted_cases.make(tiny_checkpoints, "own_parts", use_qlora=True)
    load_model(again, tmp_path / "adapted.pth")
    assert_same(outputs(again), outputs(with_adapters))


def randomise_weights(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def test_old_checkpoints_hold_frozen_weights_too(tiny_checkpoints, tmp_path):
    source = randomise_weights(adapted_cases.make(tiny_checkpoints, "clip_whisper_llama"))
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    model = adapted_cases.make(tiny_checkpoints, "clip_whisper_llama")
    load_model(model, tmp_path / "whole.pth")
    assert not changed(source.state_dict(), model.state_dict())


def test_a_whole_checkpoint_starts_an_adapted_model(tiny_checkpoints, tmp_path):
    source = randomise_weights(adapted_cases.make(tiny_checkpoints, "clip_whisper_llama"))
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    model = adapted_cases.make(tiny_checkpoints, "clip_whisper_llama", use_qlora=True)
    transfer_weights(model, tmp_path / "whole.pth")
    for part in adapted_cases.ADAPTED["clip_whisper_llama"]:
        quantize_4bit(source.get_submodule(part[:-1]))
    assert_same(outputs(model), outputs(source))


def test_what_was_frozen_may_be_trained_next(tiny_checkpoints, tmp_path):
    """The weights that the checkpoint leaves out are those of its bases."""
    source = disturb(adapted_cases.make(tiny_checkpoints, "clip_whisper_llama"))
    torch.save(trained_content(source), tmp_path / "first.pth")
    options = {"freeze_audio_encoder": False, "freeze_decoder": False}
    model = adapted_cases.make(tiny_checkpoints, "clip_whisper_llama", **options)
    transfer_weights(model, tmp_path / "first.pth")
    assert not changed(source.state_dict(), model.state_dict())


def test_missing_and_superfluous_adapters_are_named(tiny_checkpoints, tmp_path):
    plain = adapted_cases.make(tiny_checkpoints, "clip_whisper_llama")
    model = adapted_cases.make(tiny_checkpoints, "clip_whisper_llama", use_qlora=True)
    torch.save(trained_content(plain), tmp_path / "plain.pth")
    torch.save(trained_content(model), tmp_path / "adapted.pth")
    with pytest.raises(ValueError, match=r"lora_A.default.weight is missing; .*: give the model o"):
        load_model(model, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"lora_A.default.weight is unknown; .*: give the model o"):
        load_model(plain, tmp_path / "adapted.pth")
