"""What holds for every pretrained front-end: hidden layers, freezing and gradients."""

import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import CLIPModel, ViTModel, WavLMModel, WhisperFeatureExtractor, WhisperModel

from espnet.nets.encoders import AUDIO_ENCODERS, VISION_ENCODERS, pretrained_of
from espnet.nets.pytorch_backend.frontend.clip_encoder import CLIPEncoder
from espnet.nets.pytorch_backend.frontend.pretrained_encoder import PretrainedEncoder
from espnet.nets.pytorch_backend.frontend.vit_encoder import ViTEncoder
from espnet.nets.pytorch_backend.frontend.wavlm_encoder import WavLMEncoder
from espnet.nets.pytorch_backend.frontend.whisper_encoder import WhisperEncoder

LAYERS = 2  # of the tiny checkpoints
FRAMES = (10, 6)  # features of the two utterances that are encoded


def vit_states(folder, images):
    model = ViTModel.from_pretrained(folder).eval()
    out = model(images, interpolate_pos_encoding=True, output_hidden_states=True)
    return [state[:, 0] for state in (*out.hidden_states, out.last_hidden_state)]


def clip_states(folder, images):
    model = CLIPModel.from_pretrained(folder).vision_model.eval()
    out = model(images, interpolate_pos_encoding=True, output_hidden_states=True)
    return [*(state[:, 0] for state in out.hidden_states), out.pooler_output]


def whisper_states(folder, wave):
    mel = WhisperFeatureExtractor()(wave[:, 0].numpy(), sampling_rate=16000, return_tensors="pt")
    model = WhisperModel.from_pretrained(folder).encoder.eval()
    out = model(mel.input_features, output_hidden_states=True)
    states = [*out.hidden_states, out.last_hidden_state]
    return [state[0] for state in states]


def wavlm_states(folder, wave):
    model = WavLMModel.from_pretrained(folder).eval()
    out = model(wave.transpose(0, 1), output_hidden_states=True)
    states = [*out.hidden_states, out.last_hidden_state]
    return [torch.cat([state[0], state[0, -1:]]) for state in states]


@dataclass
class Case:
    """An encoder, and what transformers says of its checkpoint.

    Attributes:
        encoder: Class under test.
        states: Gives the hidden states, and last the output, of one utterance, (T, D) each.
        last_layer: Names of the weights of the last layer begin so.
        final_norm: Likewise of the final norm.
        normed: Values of encoder_layer whose features have gone through the final norm.
        options: Of the constructor, so that transformers gives the same.
        never_trained: Weights that were not trained in pretraining either.
    """

    encoder: type[PretrainedEncoder]
    states: callable
    last_layer: str
    final_norm: str = "none"
    normed: tuple = (-1,)
    options: dict = field(default_factory=dict)
    never_trained: set = field(default_factory=set)


CASES = {
    "vit": Case(ViTEncoder, vit_states, "layers.1.", "layernorm."),
    "clip": Case(CLIPEncoder, clip_states, "encoder.layers.1.", "post_layernorm."),
    "whisper": Case(
        *(WhisperEncoder, whisper_states, "layers.1.", "layer_norm."),
        normed=(-1, LAYERS, "weighted"),
        options={"margin": 30.0},
        never_trained={"embed_positions.weight"},
    ),
    "wavlm": Case(WavLMEncoder, wavlm_states, "encoder.layers.1."),
}
PRETRAINED = [*pretrained_of(VISION_ENCODERS), *pretrained_of(AUDIO_ENCODERS)]
pytestmark = pytest.mark.parametrize("name", PRETRAINED)


def make(name, tiny_checkpoints, **options):
    return CASES[name].encoder(str(tiny_checkpoints / name), **options)


def batch(name, seed=0):
    """Two utterances of 10 and 6 features, padding not zero, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    video = name in VISION_ENCODERS
    shape = (2, 10, 1, 48, 48) if video else (2, 3200, 1)
    return torch.randn(shape, generator=generator), torch.tensor(FRAMES) * (1 if video else 320)


def expected_states(name, tiny_checkpoints, encoder, x):
    """What transformers gives for one utterance."""
    if name in VISION_ENCODERS:
        x = encoder.images(x)
    return CASES[name].states(tiny_checkpoints / name, x)


def trained(encoder):
    return {key for key, parameter in encoder.named_parameters() if parameter.requires_grad}


def backpropagate(encoder, x, lengths):
    """Gradients of a loss in which every feature has a weight of its own."""
    features, _ = encoder(x, lengths)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    (features * weights).sum().backward()
    return {key: parameter.grad for key, parameter in encoder.named_parameters()}


@pytest.fixture
def with_dropout(name, tiny_checkpoints, tmp_path):
    """Folder of checkpoints whose configs ask for much dropout."""
    shutil.copytree(tiny_checkpoints / name, tmp_path / name)
    file = tmp_path / name / "config.json"
    config = json.loads(file.read_text())
    for part in (config, config.get("vision_config", {})):
        part.update({key: 0.5 for key in part if "dropout" in key})
    file.write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("encoder_layer", [-1, *range(LAYERS + 1)])
@torch.no_grad()
def test_hidden_layers_are_those_of_transformers(name, tiny_checkpoints, encoder_layer):
    options = CASES[name].options
    encoder = make(name, tiny_checkpoints, encoder_layer=encoder_layer, **options).eval()
    x, lengths = batch(name)
    features, frames = encoder(x, lengths)
    assert frames.tolist() == ([1500, 1500] if name == "whisper" else list(FRAMES))
    for row, length in enumerate(frames.tolist()):
        states = expected_states(name, tiny_checkpoints, encoder, x[row, : lengths[row]])
        assert len(states) == LAYERS + 2
        torch.testing.assert_close(features[row, :length], states[encoder_layer])
        assert not features[row, length:].any()


@torch.no_grad()
def test_weighted_is_the_mean_of_the_hidden_layers(name, tiny_checkpoints):
    options = CASES[name].options
    encoder = make(name, tiny_checkpoints, encoder_layer="weighted", **options).eval()
    assert encoder.layer_weights.tolist() == [0.0] * (LAYERS + 1)  # equal weights to begin with
    encoder.layer_weights.copy_(torch.tensor([0.5, -1.0, 2.0]))
    x, lengths = batch(name)
    features, frames = encoder(x, lengths)
    shares = torch.tensor([0.5, -1.0, 2.0]).exp()
    shares /= shares.sum()
    for row in range(2):
        states = expected_states(name, tiny_checkpoints, encoder, x[row, : lengths[row]])
        expected = sum(share * state for share, state in zip(shares, states[:-1], strict=True))
        torch.testing.assert_close(features[row, : frames[row]], expected)


def test_weights_of_layers_are_learned_though_the_rest_is_frozen(name, tiny_checkpoints):
    encoder = make(name, tiny_checkpoints, encoder_layer="weighted").train()
    assert trained(encoder) == {"layer_weights"}
    gradients = backpropagate(encoder, *batch(name))
    assert gradients.pop("layer_weights").abs().min() > 0
    assert all(gradient is None for gradient in gradients.values())


@torch.no_grad()
def test_dropout_is_active_in_what_is_trained(name, with_dropout):
    encoder = make(name, with_dropout, freeze=False)
    x, lengths = batch(name)
    expected, _ = encoder.eval()(x, lengths)
    assert not torch.allclose(encoder.train()(x, lengths)[0], expected, atol=1e-3)


@pytest.mark.parametrize("encoder_layer", [-1, 0, 1, LAYERS, "weighted"])
def test_every_trained_parameter_gets_a_gradient(name, tiny_checkpoints, encoder_layer):
    """Distributed training hangs or stops at one that gets none."""
    encoder = make(name, tiny_checkpoints, freeze=False, encoder_layer=encoder_layer).train()
    gradients = backpropagate(encoder, *batch(name))
    names = trained(encoder)
    assert all(gradients[key] is not None and gradients[key].isfinite().all() for key in names)
    # Whatever is not trained has no part in the features.
    idle = {key.removeprefix("backbone.") for key in gradients.keys() - names}
    unused = () if encoder_layer in CASES[name].normed else CASES[name].final_norm
    norm = {key for key, _ in encoder.backbone.named_parameters() if key.startswith(unused)}
    assert idle == CASES[name].never_trained | norm


@pytest.mark.parametrize("encoder_layer", [-1, 1])
def test_the_last_layer_alone_can_be_trained(name, with_dropout, encoder_layer):
    case = CASES[name]
    encoder = make(name, with_dropout, unfreeze_last_layers=1, encoder_layer=encoder_layer)
    encoder.train()
    if encoder_layer == -1:
        expected = (f"backbone.{case.last_layer}", f"backbone.{case.final_norm}")
    else:
        expected = (f"backbone.{case.last_layer}".replace("1", "0"),)
    names = {key for key, _ in encoder.named_parameters() if key.startswith(expected)}
    assert trained(encoder) == names != set()
    gradients = backpropagate(encoder, *batch(name))
    assert {key for key, gradient in gradients.items() if gradient is not None} == names
    assert all(gradients[key].isfinite().all() for key in names)
    for key, module in encoder.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            assert module.training == f"{key}.".startswith(expected), key


@torch.no_grad()
def test_what_is_below_the_trained_layer_is_as_in_eval_mode(name, with_dropout):
    encoder = make(name, with_dropout, unfreeze_last_layers=1)
    seen = []
    encoder.layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x, lengths = batch(name)
    encoder.eval()(x, lengths)
    expected = seen.copy()
    seen.clear()
    encoder.train()(x, lengths)
    torch.testing.assert_close(seen, expected, atol=0, rtol=0)


@pytest.mark.parametrize("options", [{"freeze": False}, {"unfreeze_last_layers": 1}])
def test_gradient_checkpointing_changes_no_gradient(name, with_dropout, options):
    x, lengths = batch(name)
    found, calls = [], []
    for checkpointing in (False, True):
        encoder = make(name, with_dropout, gradient_checkpointing=checkpointing, **options)
        seen = []
        norm = next(m for m in encoder.train().layers[-1].modules() if isinstance(m, nn.LayerNorm))
        norm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        torch.manual_seed(0)
        found.append(backpropagate(encoder, x, lengths))
        calls.append(len(seen))
    assert calls[1] == 2 * calls[0]  # It was computed again.
    for key in trained(encoder):
        torch.testing.assert_close(found[1][key], found[0][key])


def test_nothing_is_computed_again_when_frozen(name, tiny_checkpoints):
    encoder = make(name, tiny_checkpoints, encoder_layer="weighted").train()
    calls = []
    norm = next(m for m in encoder.layers[-1].modules() if isinstance(m, nn.LayerNorm))
    norm.register_forward_hook(lambda *_: calls.append(1))
    features, _ = encoder(*batch(name))
    before = len(calls)
    features.sum().backward()
    assert len(calls) == before > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_layer": 3}, r"--encoder-layer 3, but \w+ has 2 layers: choose -1 to 2"),
        ({"encoder_layer": -2}, r"--encoder-layer -2, but \w+ has 2 layers: choose -1 to 2"),
        ({"unfreeze_last_layers": 3}, r"--unfreeze-last-layers 3, but 2 layers of \w+ are in use"),
        (
            {"unfreeze_last_layers": 2, "encoder_layer": 1},
            r"--unfreeze-last-layers 2, but 1 layers of \w+ are in use: choose at most 1",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(name, tiny_checkpoints, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, tiny_checkpoints, **options)
