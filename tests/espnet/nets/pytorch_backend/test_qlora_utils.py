import os
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit as AdaptedLinear4bit
from torch import nn

from espnet.nets import adaptation
from espnet.nets.adaptation import AdaptationOptions
from espnet.nets.pytorch_backend import qlora_utils
from espnet.nets.pytorch_backend.ctc import CTC
from espnet.nets.pytorch_backend.decoder.llama_decoder import LLaMADecoder
from espnet.nets.pytorch_backend.decoder.transformer_decoder import TransformerDecoder
from espnet.nets.pytorch_backend.decoder.whisper_decoder import WhisperDecoder
from espnet.nets.pytorch_backend.encoder.conformer_encoder import ConformerEncoder
from espnet.nets.pytorch_backend.frontend.clip_encoder import CLIPEncoder
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder
from espnet.nets.pytorch_backend.frontend.wavlm_encoder import WavLMEncoder
from espnet.nets.pytorch_backend.frontend.whisper_encoder import WhisperEncoder
from espnet.nets.pytorch_backend.nets_utils import keep_frozen_in_eval
from espnet.nets.pytorch_backend.pretrained import enable_gradient_checkpointing
from espnet.nets.pytorch_backend.qlora_utils import (
    adapt_parts,
    adapter_names,
    add_lora,
    apply_qlora,
    merge_lora,
    parameter_report,
    plain_shapes,
    quantize_4bit,
    to_adapted_names,
    trainable_parameters,
)
from espnet.utils import tiny_checkpoints

WIDTH = 128  # two blocks of the quantisation
RANK = 4
# The quantiles of the normal distribution of the paper's appendix E.
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]
FRONTENDS = {
    "vit": ViTEncoder,
    "clip": CLIPEncoder,
    "whisper": WhisperEncoder,
    "wavlm": WavLMEncoder,
}
PART = {"conformer": ""}  # what is adapted; of the others the backbone
KINDS = [*FRONTENDS, "whisper-decoder", "llama", "conformer"]
ADAPTED = {  # layers: 4 or 5 of each attention, 2 or 3 of each feed-forward block
    "vit": 2 * 6,
    "clip": 2 * 6,
    "whisper": 2 * 6,
    "wavlm": 2 * 6,
    "whisper-decoder": 2 * 10,
    "llama": 4 * 7,
    "conformer": 2 * 9,
}
LEFT_ALONE = {
    "llama": ["lm_head"],
    "whisper-decoder": ["proj_out"],
    "wavlm": [f"encoder.layers.{i}.attention.gru_rel_pos_linear" for i in (0, 1)],  # 32 wide
}


@dataclass
class Case:
    """A model, the part that is quantised and adapted, and what the model takes."""

    model: nn.Module
    part: nn.Module
    inputs: tuple

    def outputs(self):
        outputs = self.model(*self.inputs)
        return outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints as tiny ones, but wide enough for the tables of each layer to be small."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_checkpoints, "WIDTH", WIDTH)
        patch.setitem(tiny_checkpoints.TRANSFORMER, "hidden_size", WIDTH)
        patch.setitem(tiny_checkpoints.TRANSFORMER, "intermediate_size", 2 * WIDTH)
        tiny_checkpoints.make_tiny_checkpoints(folder)
    return folder


@pytest.fixture
def make(checkpoints):
    """Makes a model of a kind in eval mode, alike each time but for `noise` on its weights."""

    def build(kind, options):
        generator = torch.Generator().manual_seed(1)
        lengths = torch.tensor([5, 3])
        folder = str(checkpoints / kind.removesuffix("-decoder"))
        if kind in ("vit", "clip"):
            x = torch.randn(2, 5, 1, 32, 32, generator=generator)
            return FRONTENDS[kind](folder, **options), (x, lengths)
        if kind in FRONTENDS:
            x = torch.randn(2, 5 * 640, 1, generator=generator)
            return FRONTENDS[kind](folder, **options), (x, 640 * lengths)
        memory = torch.randn(2, 5, WIDTH, generator=generator)
        if kind == "conformer":
            sizes = {"attention_dim": WIDTH, "linear_units": 2 * WIDTH, "cnn_module_kernel": 7}
            return ConformerEncoder(attention_heads=4, num_blocks=2, **sizes), (memory, lengths)
        tokens = torch.randint(1, 100, (2, 6), generator=generator)
        options = {"memory_dim": WIDTH, "prompt": (2, 3), "eos": 1, **options}
        if kind == "llama":
            return LLaMADecoder(folder, conditioning="prefix", **options), (tokens, memory, lengths)
        return WhisperDecoder(folder, **options), (tokens, memory, lengths)

    def case(kind, noise=0.0, **options):
        torch.manual_seed(0)
        model, inputs = build(kind, options)
        for parameter in model.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        return Case(model.eval(), model.get_submodule(PART.get(kind, "backbone")), inputs)

    return case


def quantised(module):
    """The layers in 4 bits by name."""
    layers = module.named_modules()
    return {name: layer for name, layer in layers if isinstance(layer, bitsandbytes.nn.Linear4bit)}


def adapted(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def train(model):
    """Sets training mode as the recogniser does."""
    model.train()
    keep_frozen_in_eval(model)


def adapters(module):
    return {name: p for name, p in module.named_parameters() if "lora_" in name}


def disturb(module, seed=2):
    """Gives adapters updates, which are zero at first."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(module).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def dequantised(layer):
    """The weight of a layer, in 4 bits or not, by hand: (out, in)."""
    if not isinstance(layer, bitsandbytes.nn.Linear4bit):
        return layer.weight
    state = layer.weight.quant_state
    scales = state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    scales = state.state2.code[state.absmax.long()] * scales + state.offset
    data = layer.weight.data.flatten().long()
    codes = torch.stack([data >> 4, data & 15], dim=1).flatten()  # the first in the upper half
    return (torch.tensor(NF4)[codes].view(-1, 64) * scales[:, None]).view(state.shape)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first, second):
    """Names of the tensors that are the same, bit for bit."""
    assert first.keys() == second.keys()
    return {name for name in first if torch.equal(first[name], second[name])}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_quantised_layers_are_small_and_near(make, kind):
    full, case = make(kind), make(kind)
    originals = dict(full.part.named_modules())
    expected = full.outputs()
    before = parameter_report(case.part)
    left_alone = quantize_4bit(case.part)
    layers = quantised(case.part)
    # All are in 4 bits that are not named in the report.
    linear = {name for name, layer in originals.items() if isinstance(layer, nn.Linear)}
    assert linear == layers.keys() | set(left_alone)
    assert left_alone == LEFT_ALONE.get(kind, [])

    assert not any(part.training for part in case.model.modules())

    for name, layer in layers.items():
        weight = originals[name].weight
        blocks = weight.view(-1, 64)
        error = (dequantised(layer).view(-1, 64) - blocks).abs()
        # Half the largest gap between neighbours of NF4 is 0.152; the scales have errors too.
        assert (error <= 0.165 * blocks.abs().amax(dim=1, keepdim=True)).all()
        assert layer.weight.quant_state.nested
        assert not layer.weight.requires_grad

    total = sum(originals[name].weight.numel() for name in layers)
    after = parameter_report(case.part)
    # What else there is, is as it was: the difference is that of these layers, 4 bytes a weight.
    assert after.bytes - (before.bytes - 4 * total) <= 0.30 * 2 * total
    assert after.total == before.total

    # The same as a model with the quantised weights in full precision, and near the original.
    actual = case.outputs()
    for name, layer in layers.items():
        originals[name].weight.data = dequantised(layer)
    torch.testing.assert_close(actual, full.outputs())
    error = (actual - expected).norm() / expected.norm()
    assert 0 < error < 0.35  # Normal weights get one of 0.1, and a few layers follow each other.


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_adapters_only(make, kind):
    case = make(kind)
    quantize_4bit(case.part)
    with torch.no_grad():
        expected = case.outputs()
        add_lora(case.part, rank=RANK, dropout=0.0)
        assert torch.equal(case.outputs(), expected)
    assert len(adapted(case.part)) == ADAPTED[kind]
    assert {type(layer) for layer in adapted(case.part).values()} == {AdaptedLinear4bit}

    trained = trainable_parameters(case.part)
    assert {id(p) for p in trained} == {id(p) for p in adapters(case.part).values()}
    assert len(trained) == 2 * ADAPTED[kind]
    before = snapshot(case.model)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    train(case.model)
    case.outputs().square().sum().backward()
    optimizer.step()
    case.model.eval()
    case.outputs()  # In eval mode nothing changes either.
    after = snapshot(case.model)
    assert same(before, after) == {name for name in before if "lora_" not in name}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_adapter_and_the_input(make, kind):
    case = make(kind)
    apply_qlora(case.part, rank=RANK)
    disturb(case.part)
    train(case.model)
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in case.inputs]
    case.outputs().square().sum().backward()
    gradients = {name: p.grad for name, p in case.part.named_parameters() if p.requires_grad}
    gradients |= {str(i): x.grad for i, x in enumerate(inputs) if x.requires_grad}
    assert len(gradients) == 2 * ADAPTED[kind] + 1
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "conformer"])
def test_layers_in_4_bits_are_computed_again_for_gradients(make, kind):
    gradients, calls = [], []
    for again in (False, True):
        case = make(kind, gradient_checkpointing=again)
        torch.manual_seed(3)  # of the adapters
        apply_qlora(case.part, rank=RANK)
        disturb(case.part)
        if again and kind in ("whisper", "wavlm"):  # whose constructor saw nothing to train
            enable_gradient_checkpointing(case.part)
        seen = []
        for layer in quantised(case.part).values():
            layer.register_forward_hook(lambda layer, *_, seen=seen: seen.append(layer))
        train(case.model)
        torch.manual_seed(4)  # of dropout, which is drawn again too
        case.outputs().square().sum().backward()
        gradients.append({name: p.grad for name, p in adapters(case.part).items()})
        calls.append(len(seen))
    torch.testing.assert_close(*gradients)
    assert calls[1] > 1.9 * calls[0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merging_leaves_a_plain_model_of_the_same_outputs(make, kind):
    plain, case = make(kind), make(kind)
    apply_qlora(case.part, rank=RANK, targets=["*1.*"])  # The others are in 4 bits only.
    before = case.outputs()
    disturb(case.part)
    layers = adapted(case.part)
    expected = case.outputs()
    assert (expected - before).norm() > 0.01 * before.norm()
    merge_lora(case.part)
    kinds, plain_kinds = (
        [type(layer).__name__ for layer in each.part.modules()] for each in (case, plain)
    )
    assert kinds == plain_kinds
    assert not any(part.training for part in case.model.modules())
    assert case.model.state_dict().keys() == plain.model.state_dict().keys()
    for name, layer in layers.items():
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        weight = dequantised(layer.base_layer) + 32 / RANK * update
        torch.testing.assert_close(case.part.get_submodule(name).weight, weight)
    # Sums of products in another order, through a few layers.
    torch.testing.assert_close(case.outputs(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_state_dict_restores_weights_in_4_bits(make, kind, tmp_path):
    case, other = make(kind), make(kind, noise=0.01)
    for each in (case, other):
        apply_qlora(each.part, rank=RANK)
    disturb(case.part)
    expected = case.outputs()
    assert not torch.allclose(other.outputs(), expected, atol=1e-3)
    torch.save(case.model.state_dict(), tmp_path / "model.pth")
    other.model.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert torch.equal(other.outputs(), expected)
    first, second = case.model.state_dict(), other.model.state_dict()
    assert same(first, second) == set(first)


@torch.no_grad()
def test_adapters_drop_out_in_training_only(make):
    case = make("conformer")
    quantize_4bit(case.part)
    add_lora(case.part, rank=RANK, dropout=0.5)
    disturb(case.part)
    dropouts = [layer.lora_dropout["default"] for layer in adapted(case.part).values()]
    assert [(d.p, d.training) for d in dropouts] == len(dropouts) * [(0.5, False)]
    assert torch.equal(case.outputs(), case.outputs())
    case.model.train()
    assert all(d.training for d in dropouts)


@torch.no_grad()
def test_plain_layers_are_adapted_too_without_bitsandbytes(make, monkeypatch):
    monkeypatch.setattr(qlora_utils, "INSTALLED", {"peft"})
    case = make("conformer")
    expected = case.outputs()
    add_lora(case.part, rank=RANK, targets=["self_attn.linear_*", "encoders.1.feed_forward.w_2"])
    assert torch.equal(case.outputs(), expected)
    names = {name.split("encoders.")[1] for name in adapted(case.part)}
    attention = {f"self_attn.linear_{x}" for x in ("q", "k", "v", "pos", "out")}
    assert names == {f"{i}.{x}" for i in (0, 1) for x in attention} | {"1.feed_forward.w_2"}
    disturb(case.part)
    expected = case.outputs()
    merge_lora(case.part)
    torch.testing.assert_close(case.outputs(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_precision_of_the_model_stays(make):
    case = make("conformer")
    case.model.bfloat16()
    case.inputs = (case.inputs[0].bfloat16(), case.inputs[1])
    expected = case.outputs().float()
    apply_qlora(case.part, rank=RANK)
    assert {p.dtype for p in adapters(case.part).values()} == {torch.float32}
    assert case.outputs().dtype == torch.bfloat16
    assert (case.outputs().float() - expected).norm() < 0.1 * expected.norm()
    merge_lora(case.part)
    assert {p.dtype for p in case.part.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("is_cuda", "has_bfloat16", "expected"),
    [
        (False, True, torch.float32),
        (True, True, torch.bfloat16),
        (True, False, torch.float32),  # A GPU that would only emulate bfloat16.
    ],
)
def test_the_type_of_computing_follows_the_device(is_cuda, has_bfloat16, expected, monkeypatch):
    monkeypatch.setattr(qlora_utils, "has_bfloat16", lambda: has_bfloat16)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    quantize_4bit(module)
    (hook,) = module[0]._forward_pre_hooks.values()
    module[0].compute_dtype = torch.float16
    hook(module[0], (SimpleNamespace(is_cuda=is_cuda),))
    assert module[0].compute_dtype == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_weights_from_the_cpu_serve_on_a_gpu(make):
    case = make("conformer")
    apply_qlora(case.part, rank=RANK)
    disturb(case.part)
    expected = case.outputs()
    case.model.cuda()
    case.inputs = (case.inputs[0].cuda(), case.inputs[1])  # Lengths stay on the host.
    outputs = case.outputs()
    assert {layer.compute_dtype for layer in quantised(case.part).values()} == {torch.bfloat16}
    assert outputs.dtype == torch.float32
    error = (outputs.cpu() - expected).norm() / expected.norm()
    assert 0 < error < 0.05  # bfloat16 has 8 bits.
    merge_lora(case.part)
    error = (case.outputs().cpu() - expected).norm() / expected.norm()
    assert error < 0.01  # The biases have been through bfloat16.


def test_mixed_precision_trains(make):
    case = make("conformer")
    apply_qlora(case.part, rank=RANK)
    disturb(case.part)
    expected = case.outputs().detach()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = case.outputs()
    assert (outputs - expected).norm() < 0.05 * expected.norm()  # bfloat16 has 8 bits.
    outputs.square().sum().backward()
    for parameter in adapters(case.part).values():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


class Tied(nn.Module):
    """Has every kind of layer that is to be left alone."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, WIDTH)
        self.scores = nn.Linear(WIDTH, 100, bias=False)
        self.scores.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.decoder = TransformerDecoder(
            odim=9, attention_dim=WIDTH, attention_heads=2, linear_units=WIDTH, num_blocks=1
        )
        self.ctc = CTC(odim=9, encoder_dim=WIDTH)
        self.narrow = nn.Linear(WIDTH + 32, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


def test_some_layers_are_left_alone(caplog):
    module = Tied()
    before = snapshot(module)
    feed_forward = ["decoder.decoders.0.feed_forward.w_1", "decoder.decoders.0.feed_forward.w_2"]
    with caplog.at_level("INFO"):
        left_alone = quantize_4bit(module, skip=["feed_forward.*"])
    assert sorted(left_alone) == sorted(
        ["scores", "attention.out_proj", "decoder.output_layer", "ctc.ctc_lo", "narrow"]
        + feed_forward
    )
    assert caplog.messages == [
        f"8 linear layers of Tied are in 4 bits; left alone: {', '.join(left_alone)}"
    ]
    attentions = {f"{a}_attn.linear_{x}" for a in ("self", "src") for x in ("q", "k", "v", "out")}
    assert quantised(module).keys() == {f"decoder.decoders.0.{name}" for name in attentions}
    assert module.scores.weight is module.embedding.weight
    after = snapshot(module)
    changed = {f"{name}.weight" for name in quantised(module)}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - changed)


def test_layers_are_quantised_one_by_one(monkeypatch):
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    originals = [weakref.ref(layer) for layer in module]
    alive = []
    quantise = qlora_utils._quantised

    def watch(*arguments):
        alive.append(sum(layer() is not None for layer in originals))
        return quantise(*arguments)

    monkeypatch.setattr(qlora_utils, "_quantised", watch)
    quantize_4bit(module)
    assert alive == [4, 3, 2, 1]


def test_plain_weights_are_quantised_when_they_are_loaded(make):
    full, case = make("conformer", noise=0.1), make("conformer")
    apply_qlora(case.part, rank=RANK, targets=["linear_q"])
    original = full.part.state_dict()
    state = to_adapted_names(case.part, original)
    assert len(state) == len(original)
    renamed = {name for name in state if name not in original}
    assert renamed == {
        f"encoders.{i}.self_attn.linear_q.base_layer.{kind}"
        for i in (0, 1)
        for kind in ("weight", "bias")
    }
    assert to_adapted_names(full.part, original) == original
    shapes = plain_shapes(case.part)
    assert shapes == {name: state[name].shape for name in shapes}
    assert shapes.keys() == {f"{name}.weight" for name in quantised(case.part)}
    before = snapshot(case.part)
    missing, unexpected = case.part.load_state_dict(state, strict=False)
    assert unexpected == []
    in_4_bits = quantised(case.part)
    tables = {name for name in before if name.startswith(tuple(f"{n}.weight." for n in in_4_bits))}
    assert set(missing) - tables == adapter_names(case.part) != set()
    quantize_4bit(full.part)
    after = {name.replace(".base_layer", ""): value for name, value in snapshot(case.part).items()}
    expected = full.part.state_dict()
    assert same(expected, {name: after[name] for name in expected}) == set(expected)
    assert not any(layer.weight.requires_grad for layer in in_4_bits.values())


def parts_of_two():
    return {
        "first": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)),
        "second": nn.ModuleDict({"own": nn.Linear(WIDTH, WIDTH), "1": nn.Linear(WIDTH, WIDTH)}),
    }


@pytest.mark.parametrize("how", ["use_lora", "use_qlora"])
def test_parts_share_targets(how, caplog):
    parts = parts_of_two()
    targets = ("0", "1", "own")
    options = {how: True, "lora_rank": 2, "lora_alpha": 6.0, "lora_dropout": 0.25}
    with caplog.at_level("INFO"):
        adapt_parts(parts, AdaptationOptions(lora_targets=targets, **options))
    assert adapted(parts["first"]).keys() == {"0", "1"}
    assert adapted(parts["second"]).keys() == {"own", "1"}
    assert bool(quantised(parts["first"])) == (how == "use_qlora")
    layer = parts["second"]["own"]
    assert (layer.scaling["default"], layer.lora_dropout["default"].p) == (3.0, 0.25)
    assert layer.lora_A["default"].weight.shape == (2, WIDTH)
    reports = [message for message in caplog.messages if "with adapters: " in message]
    assert [message.split()[0] for message in reports] == ["first", "second"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("0", "own", "none"), "target none matches no linear layer of first and second: choose"),
        (("own",), "LoRA target own matches no linear layer of Sequential: choose among 0, 1$"),
    ],
)
def test_each_target_is_in_a_part_and_each_part_has_a_target(targets, message):
    with pytest.raises(ValueError, match=message):
        adapt_parts(parts_of_two(), AdaptationOptions(use_lora=True, lora_targets=targets))


def test_report_counts_what_there_is():
    module = Tied()
    total = sum(p.numel() for p in module.parameters())  # The shared weight counts once.
    report = parameter_report(module)
    assert (report.total, report.trainable, report.bytes) == (total, total, 4 * total)
    assert len(trainable_parameters(module)) == len(list(module.parameters()))

    module = nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH), "second": nn.Linear(WIDTH, WIDTH)})
    apply_qlora(module, rank=RANK, targets=["first"])
    weights, added = 2 * WIDTH**2, 2 * RANK * WIDTH
    blocks = weights // 64
    tables = 2 * (4 * 16 + 4 * 256 + 4 + 4)  # codes of 4 and 8 bits; scale and offset of scales
    report = parameter_report(module)
    assert report.total == weights + 2 * WIDTH + added
    assert report.trainable == added
    assert report.bytes == weights // 2 + blocks + tables + 4 * (2 * WIDTH + added)
    assert str(report) == "34,048 parameters, 1,024 trained (3.01%), 0.0 MiB"


def test_errors_of_targets(make):
    case = make("whisper-decoder")
    before = snapshot(case.part)
    names = "k_proj, v_proj, q_proj, out_proj, fc1, fc2"
    with pytest.raises(ValueError, match=f"target query, w_1 matches .* choose among {names}$"):
        apply_qlora(case.part, targets=["fc1", "query", "w_1"])
    with pytest.raises(ValueError, match="target none matches no linear layer of Whisper"):
        add_lora(case.part, targets=[])
    with pytest.raises(ValueError, match=r"target linear_q, .* of Sequential: choose among 0$"):
        add_lora(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    assert same(before, snapshot(case.part)) == set(before)
    add_lora(case.part, targets=["fc1"])
    with pytest.raises(ValueError, match="WhisperForCausalLM has LoRA adapters already: merge"):
        add_lora(case.part, targets=["fc2"])


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_errors_of_numbers(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"{name} {value}.*: a rank of at least 1, a positive"):
        apply_qlora(nn.Sequential(nn.Linear(WIDTH, WIDTH)), targets=["0"], **options)


def use(package):
    """Uses a package through each function that needs it."""
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    calls = [lambda: apply_qlora(module, targets=["0"])]
    if package == "peft":
        return [*calls, lambda: add_lora(module, targets=["0"]), lambda: merge_lora(module)]
    in_4_bits = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    quantize_4bit(in_4_bits)
    return [*calls, lambda: quantize_4bit(module), lambda: merge_lora(in_4_bits)]


@pytest.mark.parametrize("package", ["bitsandbytes", "peft"])
@pytest.mark.parametrize("problem", ["is not installed", r"cannot be imported \(no libcuda\)"])
def test_errors_of_packages(monkeypatch, package, problem):
    def fail(name):
        if name == package:
            raise OSError("no libcuda\nand more")
        return sys.modules[name]

    calls = use(package)
    if "installed" in problem:
        monkeypatch.setattr(qlora_utils, "INSTALLED", {"bitsandbytes", "peft"} - {package})
    monkeypatch.setattr(qlora_utils, "import_module", fail)
    for call in calls:
        with pytest.raises(
            ValueError,
            match=rf'^QLoRA needs {package}, but it {problem}: pip install -U "{package}>=.*"$',
        ):
            call()


def test_error_of_a_package_that_does_not_work(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Native code method attempted to call\nand more")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fail)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    message = r"^QLoRA needs bitsandbytes, but it does not work on cpu \(Native.* call\): pip .*$"
    with pytest.raises(ValueError, match=message):
        apply_qlora(module, targets=["0"])
    assert type(module[0]) is nn.Linear


def test_packages_are_required_as_the_requirements_say():
    lines = (Path(__file__).parents[4] / "requirements.txt").read_text().splitlines()
    assert set(adaptation.REQUIREMENTS.values()) <= set(lines)


def test_packages_are_imported_when_they_are_used():
    code = (
        "import sys, espnet.nets.pytorch_backend.qlora_utils as utils; "
        "utils.parameter_report(utils.nn.Linear(2, 2)); "
        "sys.exit(len({'bitsandbytes', 'peft'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
