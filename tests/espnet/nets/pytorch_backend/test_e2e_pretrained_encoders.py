"""The recogniser with pretrained encoders: combinations, frame rate and the identity start."""

from itertools import product

import pytest
import torch

from espnet.nets.encoders import AUDIO_ENCODERS, VISION_ENCODERS, pretrained_of
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E

ODIM = 13
WIDTH = 64  # of the tiny checkpoints
FRAMES = [7, 5]
SIZES = {
    "adim": 16,
    "aheads": 2,
    "eunits": 32,
    "elayers": 1,
    "dunits": 32,
    "dlayers": 1,
    "cnn_module_kernel": 7,
    "video_width": 2,
    "audio_width": 2,
    "dropout_rate": 0.0,
}
PRETRAINED = {*pretrained_of(VISION_ENCODERS), *pretrained_of(AUDIO_ENCODERS)}
# Each with each, and each alone.
COMBINATIONS = [*product([*VISION_ENCODERS, None], [*AUDIO_ENCODERS, None])][:-1]


@pytest.fixture
def make(tiny_checkpoints):
    """Makes a model of given encoders with tiny checkpoints."""

    def model(vision, audio, **options):
        names = {"vision": vision, "audio": audio}
        for word, name in names.items():
            if name is not None:
                options[f"{word}_encoder"] = name
            if name in PRETRAINED:
                options[f"{word}_encoder_name"] = str(tiny_checkpoints / name)
        modality = "audiovisual" if vision and audio else "video" if vision else "audio"
        torch.manual_seed(0)
        return E2E.from_keywords(ODIM, modality, **{**SIZES, **options})

    return model


def batch(streams, frames=FRAMES, samples=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.tensor(samples or [640 * length for length in frames])
    every = {
        "video": torch.randn(len(frames), max(frames), 1, 24, 24, generator=generator),
        "audio": torch.randn(len(frames), int(samples.max()), 1, generator=generator),
    }
    lengths = {"video": torch.tensor(frames), "audio": samples}
    targets = torch.randint(1, ODIM - 1, (len(frames), 2), generator=generator)
    return {s: every[s] for s in streams}, {s: lengths[s] for s in streams}, targets


@pytest.mark.parametrize(("vision", "audio"), COMBINATIONS)
def test_a_step_trains_what_is_not_frozen_and_padding_changes_nothing(make, vision, audio):
    model = make(vision, audio)
    x, lengths, targets = batch(model.streams)
    model.train()
    loss = model(x, lengths, targets)[0]
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        frozen = ".backbone." in name
        assert parameter.requires_grad is not frozen
        assert frozen == (parameter.grad is None)
        assert frozen or parameter.grad.isfinite().all()
    model.eval()
    memory, frames, _ = model.encode(x, lengths)
    assert frames.tolist() == FRAMES
    for row, length in enumerate(FRAMES):
        one = {s: v[row : row + 1, : int(lengths[s][row])] for s, v in x.items()}
        alone, _, _ = model.encode(one, {s: v[row : row + 1] for s, v in lengths.items()})
        # Convolutions over batches of different shape sum in another order.
        torch.testing.assert_close(memory[row, :length], alone[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("vision", "audio"), [("vit", "wavlm"), ("clip", "whisper")])
def test_modality_dropout_with_pretrained_encoders(make, vision, audio):
    model = make(vision, audio, modality_dropout=(1.0, 0.0)).train()
    torch.nn.init.normal_(model.missing_audio)
    x, lengths, targets = batch(model.streams)
    loss = model(x, lengths, targets)[0]
    without = {"video": x["video"]}, {"video": lengths["video"]}
    torch.testing.assert_close(model(*without, targets)[0], loss)
    assert model.missing_audio.numel() == 2 * WIDTH  # in pairs: 50 a second to 25
    loss.backward()
    assert model.missing_audio.grad.any()
    assert model.missing_video.grad is not None


@pytest.mark.parametrize(("vision", "audio"), [("vit", "wavlm"), ("resnet", "resnet1d")])
def test_fifty_frames_a_second(make, vision, audio):
    model = make(vision, audio, frame_rate=50).eval()
    x, lengths, _ = batch(model.streams)
    memory, frames, _ = model.encode(x, lengths)
    assert frames.tolist() == [14, 10]
    assert memory.shape == (2, 14, 16)


@pytest.mark.parametrize("audio", ["whisper", "wavlm"])
@pytest.mark.parametrize("vision", [None, "resnet", "clip"])
def test_without_conformer_the_fusion_starts_as_the_audio(make, vision, audio):
    model = make(vision, audio, elayers=0, frame_rate=50, adim=WIDTH).eval()
    assert not any(name.startswith("encoder.") for name in model.state_dict())
    x, lengths, targets = batch(model.streams)
    memory, frames, _ = model.encode(x, lengths)
    features, feature_lengths = model.audio_frontend(x["audio"], lengths["audio"])
    assert frames.tolist() == feature_lengths.tolist()
    torch.testing.assert_close(memory, features, rtol=0, atol=0)
    model.train()
    model(x, lengths, targets)[0].backward()
    assert model.proj_encoder.weight.grad[:, :-WIDTH].any() == (vision is not None)


@pytest.mark.parametrize("options", [{"frame_rate": 25}, {"adim": 16}, {"elayers": 1}])
def test_otherwise_the_fusion_starts_at_random(make, options):
    model = make(None, "whisper", **{"elayers": 0, "frame_rate": 50, "adim": WIDTH, **options})
    assert model.proj_encoder.bias.any()


def test_streams_of_an_utterance_that_do_not_belong_together(make):
    model = make("vit", "whisper").eval()
    x, lengths, _ = batch(model.streams, samples=[7 * 640, 5 * 640 + 1280])
    model.encode(x, lengths)  # two frames more are cut off
    x, lengths, _ = batch(model.streams, samples=[7 * 640, 5 * 640 + 1281])
    with pytest.raises(ValueError, match="utterance 1 of the batch has 5 frames of video and 8 of"):
        model.encode(x, lengths)


def test_a_new_model_is_in_training_mode_but_for_what_is_frozen(make):
    model = make("clip", "whisper", freeze_audio_encoder=False)
    assert model.training
    assert not any(module.training for module in model.video_frontend.backbone.modules())
    assert all(layer.training for layer in model.audio_frontend.layers)


def test_last_layers_are_unfrozen_in_frozen_encoders_only(make):
    options = {"unfreeze_last_layers": 1, "freeze_audio_encoder": False}
    model = make("vit", "wavlm", **options)
    layers = model.video_frontend.layers
    assert not any(p.requires_grad for p in layers[0].parameters())
    assert all(p.requires_grad for p in layers[1].parameters())
    assert all(p.requires_grad for p in model.audio_frontend.parameters())


def test_the_hidden_layer_is_chosen_for_both_encoders(make):
    model = make("clip", "whisper", encoder_layer=1)
    assert len(model.video_frontend.layers) == len(model.audio_frontend.layers) == 1
    model = make("clip", "whisper", encoder_layer="weighted")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"video_frontend.layer_weights", "audio_frontend.layer_weights"} <= trained
