"""Neither a training step nor a search makes the host wait for the device, but for few places."""

import pytest
import torch

from espnet.nets import decoders
from espnet.nets.encoders import AUDIO_ENCODERS, VISION_ENCODERS
from espnet.nets.model_options import FUSIONS
from espnet.nets.pytorch_backend.encoded import Encoded, Video
from espnet.nets.search import build_beam_search
from espnet.nets.search_options import SearchOptions
from tests import adapted_cases
from tests.device_waits import Waits, to_device

TABLES = (VISION_ENCODERS, AUDIO_ENCODERS, decoders.DECODERS)
OWN = {name for table in TABLES for name, row in table.items() if not row.pretrained}
AUDIOVISUAL = {"vision_encoder": "resnet", "audio_encoder": "resnet1d"}
FINE_TUNED = {"freeze_vision_encoder": False, "freeze_audio_encoder": False}
MODELS = {
    **{name: {"modality": "video", "vision_encoder": name} for name in VISION_ENCODERS},
    **{name: {"modality": "audio", "audio_encoder": name} for name in AUDIO_ENCODERS},
    "audiovisual": AUDIOVISUAL,
    **{name: {**AUDIOVISUAL, "fusion": name} for name in FUSIONS},
    "modality_dropout": {**AUDIOVISUAL, "modality_dropout": (0.5, 0.4)},
    "50_hz": {**AUDIOVISUAL, "frame_rate": 50},
    "clip_whisper": {**adapted_cases.CLIP_WHISPER, **FINE_TUNED, "whisper_margin": 0.1},
    "vit_wavlm": {"vision_encoder": "vit", "audio_encoder": "wavlm", **FINE_TUNED},
    "weighted": {"modality": "audio", "audio_encoder": "whisper", "encoder_layer": "weighted"},
    **{
        f"lora_{name}": {**case, "use_lora": True, "lora_dropout": 0.1}
        for name, case in adapted_cases.CASES.items()
    },
}
DECODERS = {
    "transformer": {},
    "llama": {"decoder": "llama", "llama_cross_every": 2},
    "llama_prefix": {"decoder": "llama", "llama_conditioning": "prefix"},
    "whisper": {"decoder": "whisper"},
    "whisper_video": {
        "modality": "audiovisual",
        "audio_encoder": "whisper",
        "decoder": "whisper",
        "whisper_gated_video": True,
    },
}
DECODERS = {name: {"modality": "audio", **case} for name, case in DECODERS.items()}


@pytest.fixture
def make(tiny_checkpoints, monkeypatch):
    """Makes a model of a case, with dropout."""

    def model(case):
        names = {f"{part}_encoder_name": None for part in ("vision", "audio")}
        own = {f"{key}_name" for key, value in case.items() if value in OWN}
        case = {"dropout_rate": 0.1, **{k: v for k, v in names.items() if k in own}, **case}
        monkeypatch.setitem(adapted_cases.CASES, "case", case)
        return adapted_cases.make(tiny_checkpoints, "case")

    return model


def step(model, x, lengths, targets):
    torch.manual_seed(0)
    loss = model(x, lengths, targets)[0]
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("case", [*MODELS.values(), *DECODERS.values()], ids=[*MODELS, *DECODERS])
def test_a_training_step_waits_for_nothing(make, case):
    model = make(case)
    x, lengths, targets = adapted_cases.batch(model)
    expected = step(model, x, lengths, targets)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model = make(case)
    with Waits() as waits:
        loss = step(to_device(model), to_device(x), lengths, targets)
    assert waits.places == {}
    torch.testing.assert_close(loss.on_host, expected)
    for name, gradient in gradients.items():  # Attention is not in the same kernels: it rounds.
        found = model.get_parameter(name).grad.on_host
        torch.testing.assert_close(found, gradient, rtol=1e-2, atol=1e-4)


def test_a_training_step_waits_for_targets_of_the_device(make):
    model = make(DECODERS["transformer"])
    x, lengths, targets = adapted_cases.batch(model)
    with Waits() as waits:
        step(to_device(model), to_device(x), lengths, to_device(targets))
    assert waits.count == 1


def random_encoded(model, frames):
    """Random memory of utterances of so many frames, and video beside it where there is any."""
    memory = torch.randn(len(frames), max(frames), model.proj_encoder.out_features)
    width = model.ctc.ctc_lo.in_features - memory.size(2)
    video = torch.randn(len(frames), max(frames), width), torch.tensor(frames)
    return Encoded(memory, torch.tensor(frames), Video(*video) if width else None)


def encoded_on_device(encoded):
    video = encoded.video and encoded.video._replace(features=to_device(encoded.video.features))
    return encoded._replace(memory=to_device(encoded.memory), video=video)


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("case", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_a_search_waits_once_in_five_steps(make, case, ctc_weight):
    model = make(case).eval()
    encoded = random_encoded(model, [40, 25, 31])
    vocabulary = [str(i) for i in range(model.odim)]
    options = SearchOptions(beam_size=3, ctc_decode_weight=ctc_weight, length_bonus=0.5)

    def search(encoded, tokens):
        search = build_beam_search(model, options, vocabulary)
        return search(*encoded, maxlenratio=-tokens, minlenratio=1 - tokens)

    expected = search(encoded, 11)
    with Waits() as waits:
        encoded = encoded_on_device(encoded)
        to_device(model)
        found = search(encoded, 11)
        # Stop tests come after every fifth step but the last; then results are copied at once.
        assert waits.count == 3
        search(encoded, 5)
        assert waits.count == 4
    for one, two in zip(expected, found, strict=True):
        assert one[0].yseq.tolist() == two[0].yseq.tolist()
        assert one[0].score == pytest.approx(two[0].score, abs=1e-4)


@torch.no_grad()
def test_utterances_leave_a_search_without_a_wait(make):
    model = make(DECODERS["llama_prefix"]).eval()
    encoded = random_encoded(model, [4, 20, 9])
    vocabulary = [str(i) for i in range(model.odim)]
    options = SearchOptions(beam_size=3, ctc_decode_weight=0.3, length_bonus=9.0)
    search = build_beam_search(model, options, vocabulary)
    with Waits() as waits:
        to_device(model)
        found = search(*encoded_on_device(encoded))
    assert waits.count == 4
    assert [max(len(one.yseq) - 2 for one in each) for each in found] == [4, 20, 9]
