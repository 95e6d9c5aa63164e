"""Attention on packed frames, and what it must not change in the encoders that pack."""

import json
import shutil
import warnings

import pytest
import torch
from torch import nn
from transformers import WavLMConfig, WavLMModel

from espnet.nets.pytorch_backend.frontend.packed_attention import attend
from espnet.nets.pytorch_backend.frontend.wavlm_encoder import WavLMEncoder
from espnet.nets.pytorch_backend.frontend.whisper_encoder import WhisperEncoder
from espnet.nets.pytorch_backend.real_frames import RealFrames

LENGTHS = [10, 9, 7, 6, 6, 2, 1]  # blocks of three, of two, and of one each
HEADS = 2
SAMPLES = [3200, 9000, 640, 8700, 1600]
ENCODERS = {"whisper": WhisperEncoder, "wavlm": WavLMEncoder, "wavlm-large": WavLMEncoder}


@pytest.fixture(scope="module")
def folders(tiny_checkpoints, tmp_path_factory):
    """Checkpoints without dropout; that of a large WavLM, too, with no norm trivial."""
    folder = tmp_path_factory.mktemp("packing")
    for name in ("whisper", "wavlm"):
        shutil.copytree(tiny_checkpoints / name, folder / name)
        change_config(folder / name, dropout=0.0)
    config = WavLMConfig.from_pretrained(
        folder / "wavlm", do_stable_layer_norm=True, feat_extract_norm="layer"
    )
    torch.manual_seed(0)
    model = WavLMModel(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "wavlm-large")
    return folder


def change_config(folder, **options):
    """Sets every option whose name contains one of the given names."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name, value in options.items():
        config.update({key: value for key in config if name in key})
    file.write_text(json.dumps(config))


def make(name, folders, **options):
    return ENCODERS[name](str(folders / name), **options)


def waves(samples=SAMPLES, seed=0):
    """(B, S, 1), loud where padded, and lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(samples), max(samples), 1, generator=generator)
    for row, length in enumerate(samples):
        x[row, length:] = 9.0
    return x, torch.tensor(samples)


def frames(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def real_frames(lengths):
    return RealFrames(torch.tensor(lengths), max(lengths), torch.device("cpu"))


def attend_slowly(query, key, value, bias=0.0, scale=4**-0.5):
    """Attention within one utterance, (T, H, D/H) each, bias (H, T, T)."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale + bias
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)


@pytest.mark.parametrize("lengths", [LENGTHS, [5, 5, 5]])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_attention_is_that_of_each_utterance(biased, scale, lengths):
    total, longest = sum(lengths), max(lengths)
    inputs = [frames(1, total, HEADS, 4, seed=seed) for seed in range(3)]
    gates, bias = frames(1, total, HEADS, 1, seed=3), frames(HEADS, longest, longest, seed=4)
    leaves = [*inputs, gates, bias] if biased else inputs
    options = {"gates": gates, "position_bias": bias} if biased else {}
    found = attend(*inputs, real_frames(lengths), scale=scale, **options)
    assert found.shape == (1, total, HEADS, 4)
    expected = []
    for *parts, gate in zip(*(x[0].split(lengths) for x in (*inputs, gates)), strict=True):
        length = len(gate)
        added = gate.transpose(0, 1) * bias[:, :length, :length] if biased else 0.0
        expected.append(attend_slowly(*parts, added, scale or 4**-0.5))
    expected = torch.cat(expected)
    torch.testing.assert_close(found[0], expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad((found[0] * weights).sum(), leaves)
    theirs = torch.autograd.grad((expected * weights).sum(), leaves)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", [[3, 2], [5]])
def test_attention_drops_weights(lengths):
    """Of values of one, what is left is the sum of the weights: no more one."""
    torch.manual_seed(0)
    query, key = frames(1, 5, HEADS, 4), frames(1, 5, HEADS, 4, seed=1)
    value = torch.ones(1, 5, HEADS, 4)
    torch.testing.assert_close(attend(query, key, value, real_frames(lengths)), value)
    dropped = attend(query, key, value, real_frames(lengths), dropout=0.5)
    assert not torch.isclose(dropped, value).any(dim=-1).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_features_and_gradients_are_those_of_each_utterance(name, folders):
    encoder = make(name, folders, freeze=False).train()
    x, lengths = waves()
    together, numbers = encoder(x, lengths)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(1))
    (together * weights).sum().backward()
    found = {key: parameter.grad for key, parameter in encoder.named_parameters()}
    encoder.zero_grad(set_to_none=True)
    for row, (samples, number) in enumerate(zip(SAMPLES, numbers.tolist(), strict=True)):
        alone, _ = encoder(x[row : row + 1, :samples], lengths[row : row + 1])
        torch.testing.assert_close(together[row, :number], alone[0])
        (alone[0] * weights[row, :number]).sum().backward()
    for key, parameter in encoder.named_parameters():
        if parameter.grad is None:
            assert found[key] is None
            continue
        # Sums over all samples of the batch, in another order: relative to the largest. Those
        # for the biases of keys, to which a softmax is blind, are zero but for rounding.
        scale = parameter.grad.abs().max().clamp(min=0.1)
        torch.testing.assert_close(found[key] / scale, parameter.grad / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_waveforms_that_differ_by_less_than_a_feature(name, folders):
    encoder = make(name, folders).eval()
    x, lengths = waves([6500, 6600])
    together, numbers = encoder(x, lengths)
    for row, (samples, number) in enumerate(zip(lengths, numbers, strict=True)):
        alone, _ = encoder(x[row : row + 1, :samples], lengths[row : row + 1])
        torch.testing.assert_close(together[row, :number], alone[0])


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_layers_see_no_padding(name, folders):
    encoder = make(name, folders).eval()
    seen = []
    for module in encoder.layers.modules():
        if isinstance(module, nn.Linear) and module.in_features == encoder.output_dim:
            module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1]))
    _, lengths = encoder(*waves())
    real = int(lengths.sum())
    if name != "whisper":
        real -= len(lengths)  # The last feature of each is repeated.
    assert set(seen) == {(1, real)}


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_in_autocast(name, folders):
    encoder = make(name, folders).eval()
    x, lengths = waves()
    expected, _ = encoder(x, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = encoder(x, lengths)
    difference = torch.linalg.vector_norm(features - expected)
    assert difference < 0.05 * torch.linalg.vector_norm(expected)  # 8 bits of mantissa


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_attention_dropout_is_that_of_the_config(name, folders, tmp_path):
    shutil.copytree(folders / name, tmp_path / name)
    change_config(tmp_path / name, attention_dropout=0.5)
    encoder = make(name, tmp_path, freeze=False)
    x, lengths = waves()
    expected, _ = make(name, folders).eval()(x, lengths)
    torch.testing.assert_close(encoder.eval()(x, lengths)[0], expected)
    assert (encoder.train()(x, lengths)[0] - expected).abs().max() > 1e-3


class Adapted(nn.Module):
    """A linear layer with another beside it, as LoRA does it; it has no weight of its own."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.other = nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.other(x)


@pytest.mark.parametrize("samples", [SAMPLES, [1600, 1600]])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "out_proj"])
@pytest.mark.parametrize("name", ENCODERS)
def test_modules_in_place_of_projections_are_called(name, projection, samples, folders):
    encoder = make(name, folders).eval()
    x, lengths = waves(samples)
    expected, _ = encoder(x, lengths)
    layer = encoder.layers[0]
    attention = layer.self_attn if name == "whisper" else layer.attention
    torch.manual_seed(0)
    adapted = Adapted(getattr(attention, projection))
    setattr(attention, projection, adapted)
    features, _ = encoder(x, lengths)
    assert (features - expected).abs().max() > 1e-3
    (features * torch.randn(features.shape)).sum().backward()
    assert adapted.other.weight.grad.abs().max() > 0
    assert adapted.other.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_causes_no_warning(name, folders):
    encoder = make(name, folders, freeze=False).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(*waves())[0].sum().backward()
