"""Groups of parameters by rate and weight decay, and the optimisers."""

import bitsandbytes
import pytest
import torch
from torch import nn

from espnet.utils.optimizer import build_optimizer, parameter_groups
from tests.adapted_cases import adapters, assert_same, batch, make

RATES = {"lr": 1e-3, "lr_pretrained": 1e-4, "weight_decay": 0.03}


def layers(prefix, names):
    return {f"{prefix}.{name}" for name in names.split()}


def both(names):
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


# What has no weight decay, by hand.
BLOCK = "encoder.encoders.0"
LINEAR = {
    *layers(f"{BLOCK}.self_attn", "linear_q linear_k linear_v linear_out"),
    *layers(f"{BLOCK}.conv_module", "pointwise_cov1 depthwise_conv pointwise_cov2"),
    *(f"{BLOCK}.{part}.w_{i}" for part in ("feed_forward", "feed_forward_macaron") for i in (1, 2)),
    *("proj_encoder", "ctc.ctc_lo"),
}
NORMS = {
    *layers(BLOCK, "norm_ff norm_mha norm_ff_macaron norm_conv norm_final conv_module.norm"),
    "encoder.after_norm",
}
CONFORMER = both(NORMS) | {f"{name}.bias" for name in LINEAR}
CONFORMER |= layers(f"{BLOCK}.self_attn", "pos_bias_u pos_bias_v")
GATED = [f"decoder.cross_attention.{index}" for index in (0, 1)]
LLAMA = both(f"{block}.{norm}" for block in GATED for norm in ("norm", "feed_forward_norm"))
LLAMA |= {f"{block}.{gate}" for block in GATED for gate in ("gate", "feed_forward_gate")}
LLAMA |= {f"{block}.attention.linear_{x}.bias" for block in GATED for x in ("q", "k", "v", "out")}
LLAMA |= {f"{block}.feed_forward.{index}.bias" for block in GATED for index in (0, 3)}
DECODER = "decoder.decoders.0"
TRANSFORMER = both(
    {*layers(DECODER, "norm1 norm2 norm3"), "decoder.after_norm", "video_frontend.frontend3D.1"}
)
TRANSFORMER |= {
    *(f"{DECODER}.{a}_attn.linear_{x}.bias" for a in ("self", "src") for x in "q k v out".split()),
    *layers(DECODER, "feed_forward.w_1.bias feed_forward.w_2.bias"),
    *("decoder.output_layer.bias", "missing_video", "missing_audio"),
}
CASES = {
    "clip_whisper_llama": ({"use_qlora": True}, CONFORMER | LLAMA),
    "own_parts": (
        {"modality": "audiovisual", "modality_dropout": (0.1, 0.1)},
        CONFORMER | TRANSFORMER,
    ),
}


def named_groups(model, **rates):
    """For the name of each parameter in a group its rate and weight decay."""
    groups = parameter_groups(model, **{**RATES, **rates})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))  # None is in two groups.
    assert all(group["params"] for group in groups)
    return dict(found)


@pytest.mark.parametrize("case", CASES)
def test_norms_biases_and_gates_have_no_weight_decay(tiny_checkpoints, case):
    options, without = CASES[case]
    model = make(tiny_checkpoints, case, **options)
    found = named_groups(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    batch_norms = {name for name in found if "_frontend.trunk." in name and is_norm(model, name)}
    actual = {name for name, (_, weight_decay) in found.items() if weight_decay == 0}
    assert actual == without | batch_norms
    assert {decay for _, decay in found.values()} == {0.0, 0.03}


def is_norm(model, name):
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.batchnorm._BatchNorm)


def test_adapters_and_pretrained_layers_have_their_own_rate(tiny_checkpoints):
    model = make(tiny_checkpoints, "clip_whisper_llama", use_qlora=True)
    found = named_groups(model)
    assert {name for name, (lr, _) in found.items() if lr == 1e-4} == adapters(model).keys()
    assert all(found[name] == (1e-4, 0.03) for name in adapters(model))
    assert {lr for lr, _ in named_groups(model, lr_pretrained=None).values()} == {1e-3}

    model = make(tiny_checkpoints, "clip_whisper_llama", unfreeze_last_layers=1)
    slow = {name for name, (lr, _) in named_groups(model).items() if lr == 1e-4}
    last = ("video_frontend.backbone.encoder.layers.1.", "audio_frontend.backbone.layers.1.")
    norms = {"video_frontend.backbone.post_layernorm", "audio_frontend.backbone.layer_norm"}
    trained = {name for name, _ in model.named_parameters() if name.startswith(last)}
    assert slow - both(norms) == trained
    assert slow <= {name for name, p in model.named_parameters() if p.requires_grad}

    # The project's own parts, named on purpose: their adapters too.
    model = make(tiny_checkpoints, "own_encoder", use_lora=True)
    slow = {name for name, (lr, _) in named_groups(model).items() if lr == 1e-4}
    assert slow == adapters(model).keys()


def test_adapters_of_rank_one_have_weight_decay(tiny_checkpoints):
    model = make(tiny_checkpoints, "clip_whisper_llama", use_lora=True, lora_rank=1)
    found = named_groups(model)
    assert all(found[name] == (1e-4, 0.03) for name in adapters(model))


def test_a_model_without_pretrained_parts_has_one_rate(tiny_checkpoints):
    assert {lr for lr, _ in named_groups(make(tiny_checkpoints, "own_parts")).values()} == {1e-3}


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adamw8bit", bitsandbytes.optim.AdamW8bit)]
)
def test_optimisers_learn_and_go_on_from_their_state(tiny_checkpoints, tmp_path, name, kind):
    def build():
        model = make(tiny_checkpoints, "clip_whisper_llama", use_qlora=True)
        groups = parameter_groups(model, **RATES)
        return model, build_optimizer(name, groups, fused=False)

    def steps(model, optimizer, number):
        losses = []
        for _ in range(number):
            optimizer.zero_grad()
            loss = model(*batch(model))[0]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, optimizer = build()
    assert type(optimizer) is kind
    assert all(group["betas"] == (0.9, 0.98) for group in optimizer.param_groups)
    losses = steps(model, optimizer, 6)
    assert losses[-1] < 0.9 * losses[0]
    moments = {v.dtype for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)}
    assert (torch.uint8 in moments) == (name == "adamw8bit")

    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "state.pt")
    steps(model, optimizer, 2)
    resumed, other = build()
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(content["model"])
    other.load_state_dict(content["optimizer"])
    steps(resumed, other, 2)
    assert_same(resumed.parameters(), model.parameters())


def test_an_unknown_optimiser_is_refused():
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1, "weight_decay": 0.0}]
    with pytest.raises(ValueError, match="optimizer 'sgd' is unknown: choose adamw or adamw8bit"):
        build_optimizer("sgd", groups, fused=False)
