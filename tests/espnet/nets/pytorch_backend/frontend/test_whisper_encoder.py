import copy

import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder as Reference

from espnet.nets.pytorch_backend.frontend.whisper_encoder import WhisperEncoder

SAMPLES = [19_000, 320, 20_000, 150, 7_777]  # two of similar length; under one feature


def save(model, folder, seed=0):
    """Saves a model of which no bias is zero and no norm trivial."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tiny_checkpoints, tmp_path_factory):
    model = WhisperForConditionalGeneration.from_pretrained(tiny_checkpoints / "whisper")
    return save(model, tmp_path_factory.mktemp("whisper"))


def waves(samples, gain=0.1, seed=1):
    """(B, S, 1); what is beyond an utterance's end is loud."""
    generator = torch.Generator().manual_seed(seed)
    x = gain * torch.randn(len(samples), max(samples), 1, generator=generator)
    for row, length in enumerate(samples):
        x[row, length:] = 9.0
    return x


def theirs(folder, wave, positions):
    """Features of a waveform, (S,), by transformers' encoder with its first positions only."""
    model = WhisperModel.from_pretrained(folder).encoder
    config = copy.deepcopy(model.config)
    config.max_source_positions = positions
    encoder = Reference(config).eval()
    weights = model.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:positions]
    encoder.load_state_dict(weights)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    mel = extractor(wave.numpy(), sampling_rate=16000, return_tensors="pt").input_features
    return encoder(mel[..., : 2 * positions]).last_hidden_state[0]


@pytest.mark.parametrize(("margin", "silence"), [(0.0, 0), (0.5, 25), (30.0, 1500)])
@torch.no_grad()
def test_equals_transformers_alone_and_in_a_batch(folder, margin, silence):
    encoder = WhisperEncoder(str(folder), margin=margin).eval()
    x = waves(SAMPLES)
    together, lengths = encoder(x, torch.tensor(SAMPLES))
    assert encoder.speech_lengths(torch.tensor(SAMPLES)).tolist() == [60, 1, 63, 1, 25]
    assert lengths.tolist() == [min(n + silence, 1500) for n in (60, 1, 63, 1, 25)]
    for row, (samples, length) in enumerate(zip(SAMPLES, lengths.tolist(), strict=True)):
        expected = theirs(folder, x[row, :samples, 0], length)
        alone, _ = encoder(x[row : row + 1, :samples], torch.tensor([samples]))
        torch.testing.assert_close(alone[0], expected)
        torch.testing.assert_close(together[row, :length], expected)
        assert not together[row, length:].any()


@pytest.mark.parametrize("gain", [0.0, 1e-4, 20.0])
@torch.no_grad()
def test_equals_transformers_whatever_the_level(folder, gain):
    x = waves([6400], gain)
    features, _ = WhisperEncoder(str(folder)).eval()(x, torch.tensor([6400]))
    torch.testing.assert_close(features[0], theirs(folder, x[0, :, 0], 20))


@torch.no_grad()
def test_silence_after_an_utterance_matters(folder):
    """Otherwise the tests could not tell whether it was there."""
    x = waves([6400])
    none, some, all_of_it = (
        WhisperEncoder(str(folder), margin=margin).eval()(x, torch.tensor([6400]))[0][:, :20]
        for margin in (0.0, 1.0, 30.0)
    )
    assert (none - some).abs().max() > 0.1
    assert (some - all_of_it).abs().max() > 0.01


@torch.no_grad()
def test_the_margin_ends_at_30_seconds(folder):
    encoder = WhisperEncoder(str(folder), margin=2.0).eval()
    samples = torch.tensor([480_000, 470_000])  # 30 s and 29.4 s
    features, lengths = encoder(waves(samples.tolist()), samples)
    assert encoder.speech_lengths(samples).tolist() == [1500, 1469]
    assert lengths.tolist() == [1500, 1500]
    assert features.shape[1] == 1500


@torch.no_grad()
def test_takes_128_mels(folder, tmp_path):
    config = WhisperModel.from_pretrained(folder).config
    config.num_mel_bins = 128
    save(WhisperModel(config), tmp_path)
    x = waves([5000])
    features, _ = WhisperEncoder(str(tmp_path)).eval()(x, torch.tensor([5000]))
    torch.testing.assert_close(features[0], theirs(tmp_path, x[0, :, 0], 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("saved_as", [WhisperForConditionalGeneration, WhisperModel])
@torch.no_grad()
def test_loads_from_whatever_holds_the_encoder(folder, tmp_path, saved_as, dtype):
    saved_as.from_pretrained(folder, dtype=dtype).save_pretrained(tmp_path)
    encoder = WhisperEncoder(str(tmp_path))
    expected = WhisperModel.from_pretrained(folder).encoder.state_dict()
    weights = encoder.backbone.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected[name].to(dtype).float(), atol=0, rtol=0)
    features, _ = encoder(waves([640]), torch.tensor([640]))
    assert features.dtype == torch.float32


@pytest.mark.parametrize("margin", [0.0, 2.0, 30.0])
def test_too_long_an_utterance_is_an_error(folder, margin):
    encoder = WhisperEncoder(str(folder), margin=margin)
    samples = [16_000, 481_600]
    with pytest.raises(ValueError, match=r"lasts 30\.1 s, but .* at most 30 s: leave it out"):
        encoder(torch.zeros(2, max(samples), 1), torch.tensor(samples))


@torch.no_grad()
def test_takes_30_seconds(folder):
    features, lengths = WhisperEncoder(str(folder)).eval()(
        waves([480_000]), torch.tensor([480_000])
    )
    assert features.shape[:2] == (1, 1500)
    assert lengths.tolist() == [1500]
    assert features.isfinite().all()


def test_output_lengths_count_every_20_ms_that_begin(folder):
    encoder = WhisperEncoder(str(folder))
    lengths = encoder.output_lengths(torch.tensor([1, 320, 321, 16_000, 480_000]))
    assert lengths.tolist() == [1, 1, 2, 50, 1500]
