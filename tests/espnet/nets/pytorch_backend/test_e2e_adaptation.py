"""The recogniser with adapters: what it gives at the start, and what training changes."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from espnet.nets.pytorch_backend.qlora_utils import quantize_4bit
from tests.adapted_cases import (
    ADAPTED,
    CASES,
    FROZEN,
    adapters,
    assert_same,
    batch,
    changed,
    disturb,
    make,
    outputs,
    snapshot,
)

KINDS = [*((case, "use_qlora") for case in CASES), ("clip_whisper_llama", "use_lora")]
KINDS += [("vit_wavlm_whisper", "use_lora"), ("own_encoder", "use_lora")]
every_kind = pytest.mark.parametrize(("case", "how"), KINDS)


def in_4_bits(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}


def trained_names(model, case):
    """Adapters, and all that is neither adapted nor frozen."""
    frozen = (*ADAPTED[case], *FROZEN.get(case, ()))
    names = {name for name, _ in model.named_parameters() if not name.startswith(frozen)}
    return names | adapters(model).keys()


@every_kind
def test_at_the_start_outputs_are_those_without_adapters(tiny_checkpoints, case, how):
    model, plain = (make(tiny_checkpoints, case, **options) for options in ({how: True}, {}))
    state = model.state_dict()  # New parts may start elsewhere: loading in 4 bits draws numbers.
    new = {name: state[name] for name in state if not name.startswith(ADAPTED[case])}
    plain.load_state_dict(new, strict=False)
    if how == "use_qlora":
        for name in ADAPTED[case]:
            quantize_4bit(plain.get_submodule(name.rstrip(".")))
    layers = {name.removesuffix(".base_layer") for name in in_4_bits(model)}
    assert layers == in_4_bits(plain)
    assert bool(layers) == (how == "use_qlora")
    assert all(any(name.startswith(part) for name in adapters(model)) for part in ADAPTED[case])
    assert_same(outputs(model), outputs(plain))


@every_kind
def test_gradients_are_those_of_adapters_and_new_parts(tiny_checkpoints, case, how):
    model = disturb(make(tiny_checkpoints, case, **{how: True}))
    loss = model(*batch(model))[0]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == trained_names(model, case)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradients[name].any() for name in adapters(model))


@every_kind
def test_steps_change_nothing_else(tiny_checkpoints, case, how):
    gradients = []
    for checkpointing in (False, True):
        options = {how: True, "gradient_checkpointing": checkpointing}
        model = disturb(make(tiny_checkpoints, case, **options))
        before = snapshot(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
        for step in range(3):
            torch.manual_seed(step)  # WavLM has dropout of its own.
            optimizer.zero_grad()
            model(*batch(model))[0].backward()
            if step == 0:
                gradients.append({name: p.grad.clone() for name, p in trained.items()})
            optimizer.step()
        allowed = trained_names(model, case)
        allowed |= {name for name, _ in model.named_buffers() if not name.startswith(ADAPTED[case])}
        different = changed(before, snapshot(model))
        assert different <= allowed
        assert trained_names(model, case) <= different
    torch.testing.assert_close(*gradients)


@every_kind
def test_what_is_not_trained_stays_in_eval_mode(tiny_checkpoints, case, how):
    model = make(tiny_checkpoints, case, **{how: True})
    for _ in range(2):
        still = 0
        for name, part in model.named_modules():
            trained = [parameter.requires_grad for parameter in part.parameters()]
            if trained and not any(trained):
                assert not part.training, name
                still += 1
        assert still > 20
        assert all(
            dict(model.named_modules())[n.rsplit(".", 3)[0]].training for n in adapters(model)
        )
        model.eval()
        assert not any(part.training for part in model.modules())
        model.train()


@pytest.mark.parametrize("how", ["use_qlora", "use_lora"])
def test_adapters_are_in_full_precision_beside_a_decoder_in_half(tiny_checkpoints, how):
    options = {how: True, "decoder_dtype": "bfloat16"}
    model = disturb(make(tiny_checkpoints, "clip_whisper_llama", **options))
    assert {parameter.dtype for parameter in adapters(model).values()} == {torch.float32}
    assert model.decoder.backbone.model.norm.weight.dtype == torch.bfloat16
    before = snapshot(model)
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-6)  # lost in bfloat16
    loss = model(*batch(model))[0]
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    different = changed(before, snapshot(model))
    assert adapters(model).keys() <= different


def test_targets_may_be_in_some_of_the_parts(tiny_checkpoints):
    targets = ("q_proj", "layers.1.fc1", "gate_proj", "w_*")
    parts = ("vision", "audio", "encoder", "decoder")
    options = {"use_qlora": True, "lora_targets": targets, "qlora_parts": parts}
    model = make(tiny_checkpoints, "clip_whisper_llama", **options)
    layers = {name.rsplit(".", 3)[0] for name in adapters(model)}
    clip, whisper, llama = (
        *("video_frontend.backbone.encoder", "audio_frontend.backbone", "decoder.backbone.model"),
    )
    assert layers == {
        *(f"{part}.layers.{i}.self_attn.q_proj" for part in (clip, whisper) for i in range(2)),
        *(f"{llama}.layers.{i}.self_attn.q_proj" for i in range(4)),
        f"{whisper}.layers.1.fc1",  # CLIP's are in `mlp`.
        *(f"{llama}.layers.{i}.mlp.gate_proj" for i in range(4)),
        *(f"encoder.encoders.0.feed_forward{x}.w_{i}" for x in ("", "_macaron") for i in (1, 2)),
    }


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("q_proj", "query"),
            r"^LoRA target query matches no linear layer of vision and audio and decoder: choose "
            r"among .*q_proj",
        ),
        (("gate_proj",), "^LoRA target gate_proj matches no linear layer of CLIPVisionModel: choo"),
    ],
)
def test_targets_that_are_in_no_part_are_refused(tiny_checkpoints, targets, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_checkpoints, "clip_whisper_llama", use_qlora=True, lora_targets=targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_qlora": True, "use_lora": True}, "--use-qlora and --use-lora contradict"),
        ({"use_qlora": True, "qlora_parts": ("audio",)}, "--qlora-parts audio needs a pretrained"),
        ({"use_lora": True, "lora_rank": 0}, "--lora-rank 0 is out of range: at least 1"),
    ],
)
def test_wrong_combinations_are_refused(tiny_checkpoints, options, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_checkpoints, "own_parts", **options)
