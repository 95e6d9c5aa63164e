"""Figures of auto_avsr: the same weights give the same losses, gradients and features here."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E

DATA = Path(__file__).parents[3] / "data"
CASES = json.loads((DATA / "auto_avsr_reference.json").read_text())


def fill(shapes):
    """Weights by the rule that the reference figures were made with."""
    state = {}
    for name, (shape, dtype) in shapes.items():
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if dtype == "int64":
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(z)
        elif name.endswith(("running_mean", ".bias")):
            value = 0.1 * z
        elif len(shape) == 1:
            value = 1 + 0.1 * z
        else:
            value = z / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.tensor(value, dtype=getattr(torch, dtype))
    return state


def build(case):
    """The case's model with its weights, in evaluation mode."""
    dims = case["dims"]
    model = E2E(
        case["odim"],
        case["modality"],
        case["ctc_weight"],
        adim=dims["adim"],
        aheads=dims["aheads"],
        eunits=dims["eunits"],
        elayers=dims["elayers"],
        dunits=dims["dunits"],
        dlayers=dims["dlayers"],
        cnn_module_kernel=dims["kernel"],
    )
    model.load_state_dict(fill(case["state_dict"]))
    return model.eval()


def inputs(case):
    """The case's batch: features, their lengths and padded targets."""
    rs = np.random.RandomState(case["seed"])
    frames = case["frames"]
    shape = (max(frames), 1, 88, 88) if case["modality"] == "video" else (640 * max(frames), 1)
    x = torch.tensor(rs.standard_normal((len(frames), *shape)), dtype=torch.float32)
    lengths = torch.tensor(frames) * (1 if case["modality"] == "video" else 640)
    targets = torch.full((len(frames), max(case["label_lens"])), -1)
    for row, length in zip(targets, case["label_lens"], strict=True):
        row[:length] = torch.tensor(rs.randint(1, case["odim"] - 1, size=length))
    return x, lengths, targets


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
        features, _ = frontend(x, lengths) if part == "frontend" else model.encode(x, lengths)
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
    published = json.loads((DATA / "auto_avsr_state_dict.json").read_text())[modality]
    with torch.device("meta"):
        model = E2E(5049, modality)
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
