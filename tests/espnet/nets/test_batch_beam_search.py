"""The batched beam search against the slow one, and one utterance against a batch."""

import numpy as np
import pytest
import torch
from search_cases import FEATURES, LinearCTC, RecurrentDecoder, StepScorer, make_memory
from slow_beam_search import SlowCTC, slow_search

import espnet.nets.batch_beam_search as module
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.scorer_interface import ScorerInterface
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet.nets.scorers.length_bonus import LengthBonus


class Setting:
    """A model, a search over it and the slow search that it has to agree with."""

    def __init__(
        self,
        *,
        vocab_size=20,
        beam_size=4,
        ctc_weight=0.3,
        penalty=0.0,
        key="decoder",
        eos_bias=0.0,
        seed=0,
    ):
        self.vocab_size = vocab_size
        self.beam_size = beam_size
        self.eos = vocab_size - 1
        self.weights = {"decoder": 1 - ctc_weight, "ctc": ctc_weight, "length_bonus": penalty}
        self.decoder = RecurrentDecoder(vocab_size, FEATURES, eos_bias, seed)
        self.ctc = LinearCTC(vocab_size, FEATURES, seed)
        self.pre_beam = None
        if ctc_weight and ctc_weight < 1 and key and int(1.5 * beam_size) < vocab_size:
            self.pre_beam = int(1.5 * beam_size)
        self.search = BatchBeamSearch(
            beam_size,
            vocab_size,
            self.weights,
            {
                "decoder": self.decoder,
                "ctc": CTCPrefixScorer(self.ctc, self.eos),
                "length_bonus": LengthBonus(vocab_size),
            },
            self.eos,
            self.eos,
            pre_beam_score_key=key,
        )

    def slow(self, memory, *, most=None, maxlenratio=0.0, minlenratio=0.0):
        def tokens(ratio):
            return int(ratio * len(memory)) if ratio >= 0 else -int(ratio)

        log_posteriors = self.ctc.log_softmax(memory).double().numpy()
        return slow_search(
            self.decoder.of_prefix(memory, self.eos) if self.weights["decoder"] else None,
            SlowCTC(log_posteriors, 0, self.eos) if self.weights["ctc"] else None,
            self.weights,
            vocab_size=self.vocab_size,
            beam_size=self.beam_size,
            eos=self.eos,
            pre_beam=self.pre_beam,
            most=max(1, tokens(maxlenratio)) if maxlenratio else most or len(memory),
            fewest=tokens(minlenratio),
            detect_end=maxlenratio == 0,
        )

    def check(self, memory, **limits):
        nbest = self.search(memory, **limits)
        expected = self.slow(memory, **limits)
        assert [hypothesis.yseq.tolist() for hypothesis in nbest] == [
            [self.eos, *hypothesis.tokens, self.eos] for hypothesis in expected
        ]
        for hypothesis, slow in zip(nbest, expected, strict=True):
            assert hypothesis.score == pytest.approx(slow.score, abs=1e-3)
            active = {name for name, weight in self.weights.items() if weight}
            assert set(hypothesis.scores) == active
            for name in active:
                assert hypothesis.scores[name] == pytest.approx(slow.scores[name], abs=1e-3)
        return nbest


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beam_size", [1, 2, 5, 10])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.1, 0.5, 1.0])
def test_agrees_with_the_slow_search(seed, beam_size, ctc_weight):
    setting = Setting(beam_size=beam_size, ctc_weight=ctc_weight, eos_bias=1.0, seed=seed)
    assert setting.check(make_memory(12, seed))


@pytest.mark.parametrize("key", [None, "full", "decoder"])
@pytest.mark.parametrize("penalty", [-0.5, 0.0, 0.7])
def test_agrees_for_every_penalty_and_pre_beam(penalty, key):
    for seed in range(3):
        setting = Setting(penalty=penalty, key=key, eos_bias=1.0, seed=seed)
        assert setting.check(make_memory(12, seed))


@pytest.mark.parametrize("ctc_weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("maxlenratio", [0.0, 0.01, 0.5, 1.7, -1, -5])
@pytest.mark.parametrize("minlenratio", [0.0, 0.4, -3])
def test_agrees_for_every_length_limit(maxlenratio, minlenratio, ctc_weight):
    for seed in range(2):
        setting = Setting(ctc_weight=ctc_weight, eos_bias=1.0, seed=seed)
        setting.check(make_memory(10, seed), maxlenratio=maxlenratio, minlenratio=minlenratio)


def test_length_limits_hold():
    setting = Setting(ctc_weight=0.1, eos_bias=5.0)
    for nbest in (
        setting.search(make_memory(10), maxlenratio=0.6, minlenratio=0.4),
        setting.search(make_memory(10), maxlenratio=-6, minlenratio=-4),
    ):
        lengths = {len(hypothesis.yseq) - 2 for hypothesis in nbest}
        assert min(lengths) == 4
        assert max(lengths) <= 6


@pytest.mark.parametrize("seed", range(4))
def test_end_detection_stops_early(seed):
    setting = Setting(beam_size=6, ctc_weight=0.1, eos_bias=6.0, seed=seed)
    memory = make_memory(40, seed)
    nbest = setting.check(memory)
    everything = setting.check(memory, maxlenratio=1.0)
    assert max(len(one.yseq) for one in nbest) < max(len(one.yseq) for one in everything)
    assert len(nbest) < len(everything)


@pytest.mark.parametrize(
    ("end_scores", "last_step"),
    [
        # At step i, the hypotheses that ended in steps i - 4 to i - 2 are compared with the best.
        ([-20.0, -20.0, -20.0, 0.0, 0.0, 0.0, 0.0, 0.0], 4),
        ([0.0, -10.1, -10.1, -10.1, 0.0, 0.0, 0.0, 0.0], 5),
        ([0.0, -9.9, -10.1, -10.1, -10.1, -10.1, 0.0, 0.0], 6),
        ([0.0, -9.9, -9.9, -9.9, -9.9, -9.9, -9.9, -9.9], 7),
        # A length of which none has ended does not count.
        ([0.0, -20.0, -200.0, -20.0, -20.0, -20.0, -20.0, -20.0], 7),
    ],
)
def test_the_step_at_which_end_detection_stops(end_scores, last_step):
    # Two tokens of which one goes on at no cost; -200 is worse than the other one.
    table = [[-torch.inf, 0.0, -100.0, end] for end in end_scores]
    search = BatchBeamSearch(2, 4, {"steps": 1.0}, {"steps": StepScorer(table)}, 3, 3)
    nbest = search(make_memory(len(table)))
    lengths = sorted(len(hypothesis.yseq) - 2 for hypothesis in nbest)
    assert max(lengths) == (last_step if last_step < 7 else 8)
    nbest = search(make_memory(len(table)), maxlenratio=1.0)
    assert max(len(hypothesis.yseq) - 2 for hypothesis in nbest) == 8


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocab_size", [3, 4])
def test_a_vocabulary_smaller_than_the_beam(vocab_size, ctc_weight):
    setting = Setting(vocab_size=vocab_size, beam_size=12, ctc_weight=ctc_weight)
    assert setting.check(make_memory(6))


@pytest.mark.parametrize("most", [3, 30])
@pytest.mark.parametrize("beam_size", [1, 5])
def test_a_limit_of_tokens_may_be_above_and_below_the_frames(most, beam_size):
    cut = set()
    for seed in range(4):
        setting = Setting(beam_size=beam_size, ctc_weight=0.0, eos_bias=-1.0, seed=seed)
        setting.search.max_tokens = lambda _: most
        memory = make_memory(6, seed)
        nbest, expected = setting.search(memory), setting.slow(memory, most=most)
        assert [hypothesis.yseq.tolist() for hypothesis in nbest] == [
            [setting.eos, *hypothesis.tokens, setting.eos] for hypothesis in expected
        ]
        assert [setting.search.is_cut(hypothesis, 6) for hypothesis in nbest] == [
            len(hypothesis.tokens) == most for hypothesis in expected
        ]
        cut |= {setting.search.is_cut(nbest[0], 6)}
        assert setting.search(make_memory(0)) == []
    assert True in cut or most == 30


@pytest.mark.parametrize("ctc_weight", [0.0, 0.3, 1.0])
def test_a_single_frame(ctc_weight):
    setting = Setting(ctc_weight=ctc_weight)
    nbest = setting.check(make_memory(1))
    assert nbest
    assert all(len(hypothesis.yseq) <= 3 for hypothesis in nbest)


def test_nothing_ends_when_ctc_has_no_path():
    # Two tokens need two frames: the only hypotheses long enough are impossible.
    setting = Setting(ctc_weight=0.5)
    assert setting.check(make_memory(2), maxlenratio=-5, minlenratio=-4) == []
    assert setting.search(make_memory(0)) == []
    batch = torch.stack([make_memory(8, 1), make_memory(8, 2), make_memory(8, 3)])
    nbest = setting.search(batch, torch.tensor([2, 8, 0]), maxlenratio=-5, minlenratio=-4)
    assert [bool(one) for one in nbest] == [False, True, False]
    assert setting.search(batch[:0], torch.tensor([], dtype=torch.int64)) == []


@pytest.mark.parametrize("interval", [1, 3, 100])
@pytest.mark.parametrize("limits", [{}, {"maxlenratio": 0.5, "minlenratio": 0.2}])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3, 1.0])
def test_a_batch_gives_the_same_as_one_by_one(ctc_weight, limits, interval, monkeypatch):
    monkeypatch.setitem(module.STOP_TEST_INTERVAL, "cpu", interval)
    lengths = [17, 1, 40, 9, 26, 2]
    memories = [make_memory(frames, seed) for seed, frames in enumerate(lengths)]
    setting = Setting(beam_size=5, ctc_weight=ctc_weight, penalty=0.2, eos_bias=6.0)
    # Padding of any value must not matter.
    padded = torch.nn.utils.rnn.pad_sequence(memories, batch_first=True, padding_value=3.0)
    together = setting.search(padded, torch.tensor(lengths), **limits)
    assert len(together) == len(lengths)
    for memory, nbest in zip(memories, together, strict=True):
        alone = setting.search(memory, **limits)
        assert alone
        assert [one.yseq.tolist() for one in nbest] == [one.yseq.tolist() for one in alone]
        scores, expected = ([[*one.scores.values()] for one in each] for each in (nbest, alone))
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        np.testing.assert_allclose(
            [one.score for one in nbest], [one.score for one in alone], atol=1e-4
        )


@pytest.mark.parametrize("ctc_weight", [0.0, 0.1, 0.3])
def test_how_often_the_stop_test_comes_changes_nothing(ctc_weight, monkeypatch):
    """Utterances that are over go on for some steps, and nothing comes of it."""
    lengths = [30, 12, 22]
    memories = [make_memory(frames, seed) for seed, frames in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(memories, batch_first=True)
    setting = Setting(beam_size=5, ctc_weight=ctc_weight, eos_bias=6.0)
    choose, chosen = setting.search._choose, []
    monkeypatch.setattr(setting.search, "_choose", lambda *a: chosen.append(a) or choose(*a))
    results, steps = [], []
    for interval in (1, 4, 7, 100):
        monkeypatch.setitem(module.STOP_TEST_INTERVAL, "cpu", interval)
        nbest = setting.search(padded, torch.tensor(lengths))
        results.append([[(one.yseq.tolist(), one.scores) for one in each] for each in nbest])
        steps.append(len(chosen) - sum(steps))
    assert steps[0] < steps[-1] == max(lengths)
    for result in results[1:]:
        assert [[yseq for yseq, _ in each] for each in result] == [
            [yseq for yseq, _ in each] for each in results[0]
        ]
        for each, expected in zip(result, results[0], strict=True):
            for (_, scores), (_, expected_scores) in zip(each, expected, strict=True):
                assert scores == pytest.approx(expected_scores, abs=1e-4)


def test_hypotheses_are_plain_and_sorted():
    setting = Setting(penalty=0.5)
    nbest = setting.search(make_memory(10), maxlenratio=-4)
    scores = [hypothesis.score for hypothesis in nbest]
    assert scores == sorted(scores, reverse=True)
    assert nbest[0].yseq.dtype == torch.int64
    weighted = sum(setting.weights[name] * value for name, value in nbest[0].scores.items())
    assert nbest[0].score == pytest.approx(weighted, abs=1e-5)
    plain = nbest[0].asdict()
    assert plain["yseq"] == nbest[0].yseq.tolist()
    assert plain["score"] == nbest[0].score
    assert plain["scores"] == nbest[0].scores


def test_scorers_without_weight_are_not_called():
    class Broken(ScorerInterface, abstract=True):
        pass

    decoder = RecurrentDecoder(6, FEATURES)
    arguments = {"beam_size": 2, "vocab_size": 6, "sos": 5, "eos": 5}
    scorers = {"decoder": decoder, "ctc": Broken(), "lm": None}
    weights = {"decoder": 1.0, "ctc": 0.0, "lm": 0.0}
    search = BatchBeamSearch(weights=weights, scorers=scorers, token_list=[""] * 6, **arguments)
    assert search(make_memory(4))
    # The key of the pre-beam may name a scorer that is left out.
    scorers = {"decoder": Broken(), "ctc": CTCPrefixScorer(LinearCTC(6, FEATURES), 5)}
    search = BatchBeamSearch(
        weights={"ctc": 1.0}, scorers=scorers, pre_beam_score_key="decoder", **arguments
    )
    assert search(make_memory(4))


def make_search(**changes):
    arguments = {
        "beam_size": 2,
        "vocab_size": 6,
        "weights": {"decoder": 0.9, "ctc": 0.1},
        "scorers": {
            "decoder": RecurrentDecoder(6, FEATURES),
            "ctc": CTCPrefixScorer(LinearCTC(6, FEATURES), 5),
        },
        "sos": 5,
        "eos": 5,
    }
    return BatchBeamSearch(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_size": 0}, "beam_size 0 with pre_beam_ratio 1.5: .* at least 1"),
        ({"pre_beam_ratio": 0.2}, "beam_size 2 with pre_beam_ratio 0.2: .* at least 1"),
        ({"sos": 6}, "sos 6 and eos 5 must be from 0 to 5"),
        ({"eos": -1}, "sos 5 and eos -1 must be from 0 to 5"),
        ({"token_list": ["a"]}, "token_list has 1 tokens and the vocabulary 6"),
        ({"weights": {"lm": 1.0}}, "every weight other than 0 needs its scorer"),
        ({"weights": {}}, "at least one is needed"),
        ({"pre_beam_score_key": "lm"}, "pre_beam_score_key lm: expected .* decoder$"),
        ({"pre_beam_score_key": "ctc"}, "pre_beam_score_key ctc: expected .* decoder$"),
    ],
)
def test_mistakes_in_the_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        make_search(**changes)


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((4,), None),
        ((1, 4, FEATURES), None),
        ((4, FEATURES), [4]),
        ((2, 4, FEATURES), [4]),
        ((1, 4, FEATURES), [[4]]),
    ],
)
def test_mistakes_in_the_input(shape, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match=r"memory \(.*pass \(T, D\) alone, or"):
        make_search()(torch.zeros(shape), lengths)
