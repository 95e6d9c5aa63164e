"""Figures of auto_avsr: the same weights give the same n-best lists here."""

import numpy as np
import pytest
import torch

from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet.nets.scorers.length_bonus import LengthBonus
from tests import auto_avsr_cases

CASES = {case["modality"]: case for case in auto_avsr_cases.CASES}
SETTINGS = [
    (modality, number) for modality, case in CASES.items() for number in range(len(case["beam"]))
]


def encode(case):
    """Return the model and the encoder output of its utterances, each computed alone."""
    model = auto_avsr_cases.build(case)
    x, lengths, _ = auto_avsr_cases.inputs(case)
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
