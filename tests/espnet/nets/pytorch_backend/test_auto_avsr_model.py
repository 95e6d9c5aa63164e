"""Figures of auto_avsr: the same weights give the same losses, gradients and features here."""

import pytest
import torch

from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from tests.auto_avsr_cases import CASES, FULL_SIZE, build, inputs


@pytest.fixture(params=CASES, ids=lambda case: case["modality"])
def case(request):
    return request.param


def close(value):
    return pytest.approx(value, rel=1e-4)


def test_losses_and_accuracy(case):
    loss, loss_ctc, loss_att, acc = build(case)(*inputs(case))
    assert loss.item() == close(case["loss"])
    assert loss_ctc.item() == close(case["loss_ctc"])
    assert loss_att.item() == close(case["loss_att"])
    assert acc.item() == close(case["acc"])


def test_gradients(case):
    model = build(case)
    model(*inputs(case))[0].backward()
    gradients = {
        name.replace(f"{case['modality']}_frontend.", "frontend."): parameter.grad
        for name, parameter in model.named_parameters()
    }
    norms = {name: gradients[name].norm().item() for name in case["grad_norms"]}
    assert norms == close(case["grad_norms"])


@pytest.mark.parametrize("part", ["frontend", "encoder"])
def test_features_of_first_utterance(case, part):
    model, (x, lengths, _) = build(case), inputs(case)
    x, lengths = x[:1], lengths[:1]
    frontend = getattr(model, f"{case['modality']}_frontend")
    with torch.no_grad():
        features = (frontend if part == "frontend" else model.encode)(x, lengths)[0]
    expected = case[f"{part}_utt0"]
    assert list(features.shape) == expected["shape"]
    assert features.mean().item() == close(expected["mean"])
    assert features.std().item() == close(expected["std"])
    flat = features.flatten()
    # Stored with six decimals.
    torch.testing.assert_close(flat[:6], torch.tensor(expected["first"]), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(flat[-6:], torch.tensor(expected["last"]), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_full_size_state_dict_is_the_same(modality):
    """All 767 entries of the published models, by name, shape and type, and no other."""
    published = FULL_SIZE[modality]
    with torch.device("meta"):
        model = E2E.from_keywords(5049, modality)
    ours = {
        name.replace(f"{modality}_frontend.", "frontend."): [
            list(value.shape),
            str(value.dtype).removeprefix("torch."),
        ]
        for name, value in model.state_dict().items()
    }
    assert len(published) == 767
    assert ours == published
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, (shape, _) in published.items()}
    assert model.load_state_dict(state, assign=True, strict=True)
