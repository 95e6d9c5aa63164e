"""Figures of auto_avsr: the same weights give the same n-best lists here."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.pytorch_backend.e2e_asr_conformer import E2E
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet.nets.scorers.length_bonus import LengthBonus

REFERENCE = Path(__file__).parents[2] / "data" / "auto_avsr_reference.json"
CASES = {case["modality"]: case for case in json.loads(REFERENCE.read_text())}
SETTINGS = [
    (modality, number) for modality, case in CASES.items() for number in range(len(case["beam"]))
]


def fill(shapes):
    """Return the weights that the figures were made with."""
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


def encode(case):
    """Return the model and the encoder output of its utterances, each computed alone."""
    sizes = {name: size for name, size in case["dims"].items() if name != "kernel"}
    model = E2E(
        case["odim"],
        case["modality"],
        case["ctc_weight"],
        cnn_module_kernel=case["dims"]["kernel"],
        **sizes,
    )
    model.load_state_dict(fill(case["state_dict"]))
    model.eval()
    rng = np.random.RandomState(case["seed"])
    frames = case["frames"]
    video = case["modality"] == "video"
    shape = (max(frames), 1, 88, 88) if video else (640 * max(frames), 1)
    x = torch.tensor(rng.standard_normal((len(frames), *shape)), dtype=torch.float32)
    lengths = torch.tensor(frames) * (1 if video else 640)
    with torch.no_grad():
        pairs = zip(x, lengths, strict=True)
        return model, [model.encode(one[None], length[None])[0][0] for one, length in pairs]


@pytest.fixture(scope="module")
def encoded():
    return {modality: encode(case) for modality, case in CASES.items()}


def make_search(model, setting):
    weight = setting["ctc_weight"]
    return BatchBeamSearch(
        setting["beam_size"],
        model.odim,
        {"decoder": 1 - weight, "ctc": weight, "length_bonus": setting["penalty"]},
        {
            "decoder": model.decoder,
            "ctc": CTCPrefixScorer(model.ctc, model.eos),
            "length_bonus": LengthBonus(model.odim),
        },
        model.sos,
        model.eos,
        pre_beam_score_key="decoder",
    )


def check(nbest, setting):
    assert len(nbest) == setting["n_ended"]
    assert len(nbest) >= len(setting["nbest"]) > 0
    for hypothesis, expected in zip(nbest, setting["nbest"], strict=False):
        assert hypothesis.yseq.tolist() == expected["yseq"]
        assert hypothesis.score == pytest.approx(expected["score"], abs=5e-3)
        assert hypothesis.scores["decoder"] == pytest.approx(expected["decoder"], abs=5e-3)
        assert hypothesis.scores["ctc"] == pytest.approx(expected["ctc"], abs=5e-3)


@pytest.mark.parametrize(("modality", "number"), SETTINGS)
def test_nbest_of_the_first_utterance(encoded, modality, number):
    model, memories = encoded[modality]
    setting = CASES[modality]["beam"][number]
    nbest = make_search(model, setting)(memories[0], maxlenratio=setting.get("maxlenratio", 0.0))
    check(nbest, setting)


@pytest.mark.parametrize(("modality", "number"), SETTINGS)
def test_nbest_in_a_padded_batch(encoded, modality, number):
    model, memories = encoded[modality]
    setting = CASES[modality]["beam"][number]
    search = make_search(model, setting)
    limits = {"maxlenratio": setting.get("maxlenratio", 0.0)}
    memories = [memories[1][:7], memories[0], torch.cat(memories)]
    padded = torch.nn.utils.rnn.pad_sequence(memories, batch_first=True)
    together = search(padded, torch.tensor([len(memory) for memory in memories]), **limits)
    check(together[1], setting)
    for memory, nbest in zip(memories, together, strict=True):
        alone = search(memory, **limits)
        assert [one.yseq.tolist() for one in nbest] == [one.yseq.tolist() for one in alone]
        np.testing.assert_allclose(
            [one.score for one in nbest], [one.score for one in alone], atol=1e-3
        )
