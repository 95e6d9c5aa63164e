import copy
import math

import pytest
import torch
from torch import nn

from benchmarks import train_step
from benchmarks.train_step import Work

CPU = torch.device("cpu")
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
WORK = Work(
    elayers=2, repeats=1, frames=(9, 4, 7, 1), crop=24, odim=11, sizes={**SIZES, "dropout_rate": 0}
)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def note_inputs(module, kinds):
    """Shape of what each layer of these kinds is given, by name, once the module has run."""
    shapes = {}

    def note(name, shape):
        shapes[name] = shape

    for name, layer in module.named_modules():
        if isinstance(layer, kinds):
            layer.register_forward_hook(
                lambda _, args, __, name=name: note(name, tuple(args[0].shape))
            )
    return shapes


def test_the_reference_computes_the_same_loss_gradients_and_statistics():
    utterances = train_step.make_utterances(WORK, CPU)
    model = train_step.build_model(WORK, CPU)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)  # no weight has a special value
    twin = copy.deepcopy(model)
    loss = train_step.padded_step(model, utterances)()
    expected = train_step.reference_step(twin, utterances)()
    torch.testing.assert_close(loss, expected)
    # Sums over thousands of pixels and samples, in another order.
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))


def frame_counts(shapes):
    """Numbers of rows but for the positions, of which a Conformer has 2T - 1."""
    return {math.prod(shape[:-1]) for name, shape in shapes.items() if "linear_pos" not in name}


FRAMES, TOKENS = sum(WORK.frames), 2 + 1 + 1 + 1 + len(WORK.frames)


def test_the_reference_never_computes_on_padding():
    model = train_step.build_model(WORK, CPU)
    linear = note_inputs(model, nn.Linear | nn.LayerNorm)
    norms = note_inputs(model.audio_frontend, nn.BatchNorm1d)
    train_step.reference_step(model, train_step.make_utterances(WORK, CPU))()
    assert frame_counts(linear) == {FRAMES, TOKENS}
    assert frame_counts(norms) == {FRAMES * steps for steps in (20, 40, 80, 160)}


def test_only_real_frames_pass_through_front_end_and_conformer():
    model = train_step.build_model(WORK, CPU)
    layers = note_inputs(model.encoder, nn.Linear | nn.LayerNorm | nn.BatchNorm1d)
    norms = note_inputs(model.audio_frontend, nn.BatchNorm1d)
    train_step.padded_step(model, train_step.make_utterances(WORK, CPU))()
    assert frame_counts(layers) == {FRAMES}
    assert frame_counts(norms) == {FRAMES * steps for steps in (20, 40, 80, 160)}


@pytest.mark.parametrize("frames", [(9, 4, 7, 1), (5, 5)])
def test_only_real_frames_pass_through_the_resnet_of_the_video(frames):
    work = Work(elayers=1, repeats=1, frames=frames, crop=24, odim=11, sizes=SIZES)
    model = train_step.build_model(work, CPU)
    shapes = note_inputs(
        model.video_frontend, nn.Conv2d | nn.BatchNorm2d | nn.BatchNorm3d | nn.MaxPool2d
    )
    train_step.padded_step(model, train_step.make_utterances(work, CPU))()
    # A norm and the pooling before eight blocks of two convolutions and norms each; the
    # shortcuts' three norms.
    assert len(shapes) == 2 + 8 * 4 + 3
    assert {shape[0] for shape in shapes.values()} == {sum(frames)}


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
def test_prints_a_table(arguments, monkeypatch, capsys):
    monkeypatch.setitem(train_step.WORK, "cpu", WORK)
    monkeypatch.setattr(torch, "compile", lambda model: model)  # It takes a minute.
    train_step.main(["--device", "cpu", *arguments])
    facts, empty, *table = capsys.readouterr().out.splitlines()
    assert facts == f"torch {torch.__version__}, cpu, 1 CPU threads, float32"
    assert not empty
    end = table.index("")
    head, line, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table[:end])
    assert head == ["what", "time (ms)", "reference (ms)", "ratio", "target"]
    assert line == ["---"] * 5
    assert [target for *_, target in rows[:2]] == ["at most 1.15 times"] * 2
    assert rows[0][0] == (
        "training step, 2 Conformer blocks, 4 utterances, 21 frames in all (reference: real frames "
        "only)"
    )
    settings = ["bfloat16", "torch.compile", "torch.compile and bfloat16"] if arguments else []
    assert [what.split(" (")[0] for what, *_ in rows[2:]] == [
        f"training step in {setting}" for setting in settings
    ]
    notes = table[end + 1 :]
    assert [note.split(":")[0] for note in notes] == ["- float32", *(f"- {s}" for s in settings)]
    assert all(" frames and " in note and " tokens a second" in note for note in notes)
