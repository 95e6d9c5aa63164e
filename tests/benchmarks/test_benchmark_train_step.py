import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import train_step
from benchmarks.common import CPU
from benchmarks.train_step import Work

SIZES = {
    "adim": 16,
    "aheads": 2,
    "eunits": 32,
    "dunits": 32,
    "dlayers": 2,
    "cnn_module_kernel": 7,
    "video_width": 2,
    "audio_width": 2,
}
WORK = Work(elayers=2, repeats=1, frames=(9, 4, 7, 12), crop=24, odim=11, sizes=SIZES)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def note_inputs(module, kinds):
    """Shape of what each layer of these kinds is given, by name, once the module has run."""
    shapes = {}
    for name, layer in module.named_modules():
        if isinstance(layer, kinds):
            layer.register_forward_pre_hook(
                lambda _, args, name=name: shapes.update({name: tuple(args[0].shape)})
            )
    return shapes


def test_one_by_one_has_the_loss_and_the_gradients_of_the_batch():
    utterances = train_step.utterances_of(WORK)
    model = train_step.build_model(WORK, CPU).eval()  # batch norm does not look at the batch
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)  # no weight has a special value
    twin = copy.deepcopy(model)
    loss = train_step.step_on(model, [utterances], CPU)()
    expected = train_step.step_on(twin, [[one] for one in utterances], CPU)()
    torch.testing.assert_close(loss, expected)
    # Sums over thousands of pixels and samples, in another order.
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-3, atol=1e-5)


def test_equal_utterances_hold_the_same_without_padding():
    utterances = train_step.utterances_of(WORK)
    equal = train_step.equal_utterances(utterances)
    for name in ("video", "audio", "target"):
        before, after = ([getattr(one, name) for one in many] for many in (utterances, equal))
        torch.testing.assert_close(torch.cat(after), torch.cat(before))
        assert max(map(len, after)) - min(map(len, after)) <= (name == "target")


@pytest.mark.parametrize("frames", [(9, 4, 7, 1), (5, 5)])
def test_only_real_frames_pass_through_front_ends_and_conformer(frames):
    work = replace(WORK, frames=frames)
    model = train_step.build_model(work, CPU)
    pixels = nn.Conv2d | nn.BatchNorm2d | nn.BatchNorm3d | nn.MaxPool2d
    video = note_inputs(model.video_frontend, pixels)
    audio = note_inputs(model.audio_frontend, nn.BatchNorm1d)
    layers = note_inputs(model.encoder, nn.Linear | nn.LayerNorm | nn.BatchNorm1d)
    train_step.step_on(model, [train_step.utterances_of(work)], CPU)()
    # A norm and the pooling before eight blocks of two convolutions and norms each; the
    # shortcuts' three norms.
    assert len(video) == 2 + 8 * 4 + 3
    assert {shape[0] for shape in video.values()} == {sum(frames)}
    assert {math.prod(s[:-1]) for s in audio.values()} == {
        sum(frames) * steps for steps in (20, 40, 80, 160)
    }
    # Of positions, a Conformer has 2T - 1.
    rows = {math.prod(s[:-1]) for name, s in layers.items() if "linear_pos" not in name}
    assert rows == {sum(frames)}


def test_the_model_of_the_benchmark_has_auto_avsrs_sizes():
    with torch.device("meta"):
        model = train_step.E2E.from_keywords(5049, "audiovisual", elayers=12)
    millions = {name: 0.0 for name, _ in model.named_children()}
    for name, parameter in model.named_parameters():
        millions[name.split(".")[0]] += parameter.numel() / 1e6
    assert {name: round(number) for name, number in millions.items()} == {
        "video_frontend": 11,
        "audio_frontend": 4,
        "proj_encoder": 1,
        "encoder": 170,
        "decoder": 64,
        "ctc": 4,
    }
    assert train_step.WORK["cuda"] == Work(elayers=12, repeats=10)
    frames = train_step.WORK["cpu"].frames
    assert (len(frames), max(frames), min(frames)) == (8, 160, 40)
    assert 1 - sum(frames) / (8 * 160) == 0.375


def test_the_share_of_other_work():
    kernels = [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>", 30.0),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_nhwc", 20.0),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", 10.0),
        ("pytorch_flash::flash_fwd_kernel", 10.0),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", 25.0),
        ("void at::native::batch_norm_collect_statistics_channels_last_kernel", 5.0),
    ]
    assert train_step.other_share(kernels) == pytest.approx(0.3)
    operators = [
        ("aten::addmm", 4.0),
        ("aten::mm", 2.0),
        ("aten::mkldnn_convolution", 3.0),
        ("aten::convolution_backward", 1.0),
        ("aten::mul", 8.0),
        ("aten::copy_", 2.0),
    ]
    assert train_step.other_share(operators) == pytest.approx(0.5)


@pytest.mark.parametrize("arguments", [[], ["--compile"]])
def test_prints_a_table(arguments, monkeypatch, tables):
    monkeypatch.setitem(train_step.WORK, "cpu", WORK)
    monkeypatch.setattr(torch, "compile", lambda model: model)  # It takes a minute.
    train_step.main(["--device", "cpu", *arguments])
    (table,) = tables()
    assert table.head == ["what", "time (ms)", "reference (ms)", "ratio", "target"]
    content = "4 utterances, 32 frames in all"
    settings = ["bfloat16", "torch.compile", "torch.compile and bfloat16"] if arguments else []
    assert [row[0] for row in table.rows] == [
        f"training step, 2 Conformer blocks, {content} (reference: one by one)",
        f"training step, 2 Conformer blocks, {content} (reference: the same without padding)",
        f"ResNet of the video, {content} (reference: as one utterance)",
        *[f"training step in {name} (reference: float32, not compiled)" for name in settings],
    ]
    targets = [row[-1].split(":")[0] for row in table.rows]
    faster = "at least 1 times faster"
    assert targets == [faster, *["at most 1.15 times"] * 2, *[faster] * len(settings)]
    names = [f"- {name}" for name in ("float32", *settings)]
    assert [note.split(":")[0] for note in table.notes] == names
    assert all(" frames and " in note and " tokens a second" in note for note in table.notes)
