import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import WavLMConfig, WavLMModel

from espnet.nets.pytorch_backend.frontend.wavlm_encoder import WavLMEncoder

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
KINDS = {  # what differs between the published base and large models
    "base": {"feat_extract_norm": "group", "do_stable_layer_norm": False},
    "large": {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
}
# Some of similar length, ends that give all features and all but one, and under 25 ms.
SAMPLES = [640, 15_123, 6_400, 330, 16_000, 720, 6_100, 400]


def save(folder, seed=0, **options):
    """Saves a model of which no bias is zero and no norm trivial."""
    torch.manual_seed(seed)
    model = WavLMModel(WavLMConfig(**SIZES, **options))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return save(tmp_path_factory.mktemp(request.param), **KINDS[request.param])


def waves(samples, seed=1):
    """(B, S, 1); what is beyond an utterance's end is loud."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(samples), max(samples), 1, generator=generator)
    for row, length in enumerate(samples):
        x[row, length:] = 9.0
    return x


def theirs(folder, wave):
    """Features of a waveform, (S,), by transformers, the last repeated where one is missing."""
    model = WavLMModel.from_pretrained(folder).eval()
    wave = F.pad(wave, (0, max(0, 400 - len(wave))))
    features = model(wave[None]).last_hidden_state[0]
    missing = len(wave) // 320 - len(features)
    return torch.cat([features, features[-1:].expand(missing, -1)])


@torch.no_grad()
def test_equals_transformers_alone_and_in_a_batch(folder):
    encoder = WavLMEncoder(folder).eval()
    x = waves(SAMPLES)
    together, lengths = encoder(x, torch.tensor(SAMPLES))
    assert lengths.tolist() == [2, 47, 20, 1, 50, 2, 19, 1]
    for row, (samples, length) in enumerate(zip(SAMPLES, lengths.tolist(), strict=True)):
        expected = theirs(folder, x[row, :samples, 0])
        alone, _ = encoder(x[row : row + 1, :samples], torch.tensor([samples]))
        torch.testing.assert_close(alone[0], expected)
        torch.testing.assert_close(together[row, :length], expected)
        assert not together[row, length:].any()


@pytest.mark.parametrize("seconds", [1, 2, 4])
@torch.no_grad()
def test_a_second_has_50_features(folder, seconds):
    encoder = WavLMEncoder(folder).eval()
    samples = 16_000 * seconds
    features, lengths = encoder(waves([samples]), torch.tensor([samples]))
    assert lengths.tolist() == [50 * seconds] == [features.size(1)]
    torch.testing.assert_close(features[0, -1], features[0, -2], atol=0, rtol=0)
    assert (features[0, -2] - features[0, -3]).abs().max() > 0.01


def test_output_lengths_count_full_20_ms(folder):
    lengths = WavLMEncoder(folder).output_lengths(torch.tensor([320, 639, 640, 16_000]))
    assert lengths.tolist() == [1, 1, 2, 50]


@pytest.mark.parametrize("encoder_layer", [-1, 0, 1, "weighted"])
def test_every_trained_parameter_gets_a_gradient(folder, encoder_layer):
    encoder = WavLMEncoder(folder, freeze=False, encoder_layer=encoder_layer).train()
    features, _ = encoder(waves([3200, 1600]), torch.tensor([3200, 1600]))
    (features * torch.randn_like(features)).sum().backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_neither_masking_nor_layer_drop_of_the_checkpoint_is_in_use(tmp_path):
    dropouts = ("hidden", "attention", "activation", "feat_proj")
    folder = save(
        tmp_path,
        **{f"{name}_dropout": 0.0 for name in dropouts},
        **{"layerdrop": 1.0, "mask_time_prob": 0.5, "mask_feature_prob": 0.5},
        mask_feature_length=4,
    )
    encoder = WavLMEncoder(folder, freeze=False)
    x, lengths = waves([16_000, 9_000]), torch.tensor([16_000, 9_000])
    torch.testing.assert_close(encoder.train()(x, lengths)[0], encoder.eval()(x, lengths)[0])


def test_loads_the_weight_norm_of_published_checkpoints(folder, tmp_path):
    """They were saved by an older torch, which named its weights otherwise."""
    weights = WavLMModel.from_pretrained(folder).state_dict()
    names = {"parametrizations.weight.original0": "weight_g"}
    names["parametrizations.weight.original1"] = "weight_v"
    published = {}
    for name, weight in weights.items():
        for new, old in names.items():
            name = name.replace(new, old)
        published[name] = weight
    assert published.keys() != weights.keys()
    shutil.copy(f"{folder}/config.json", tmp_path)
    torch.save(published, tmp_path / "pytorch_model.bin")
    for name, weight in WavLMEncoder(str(tmp_path)).backbone.state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=0, rtol=0)


@torch.no_grad()
def test_a_checkpoint_without_masking_loads(tmp_path):
    folder = save(tmp_path, mask_time_prob=0.0)
    x = waves([1600])
    features, _ = WavLMEncoder(folder).eval()(x, torch.tensor([1600]))
    torch.testing.assert_close(features[0], theirs(folder, x[0, :, 0]))
