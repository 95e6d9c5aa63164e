"""The search by the rules of `generate`, and hypotheses that begin to repeat themselves."""

import pytest
import torch
from search_cases import FEATURES, LinearCTC, RecurrentDecoder, StepScorer, make_memory
from slow_beam_search import slow_generate

import espnet.nets.batch_beam_search as module
from espnet.nets.batch_beam_search import BatchBeamSearch
from espnet.nets.scorer_interface import ScorerInterface
from espnet.nets.scorers.ctc import CTCPrefixScorer

VOCABULARY = 12
EOS = VOCABULARY - 1


def make_search(decoder, beam_size, **options):
    return BatchBeamSearch(
        *(beam_size, VOCABULARY, {"decoder": 1.0}, {"decoder": decoder}, EOS, EOS),
        **{"end_when_beaten": True, **options},
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
@pytest.mark.parametrize("eos_bias", [-2.0, 1.0, 4.0])
def test_agrees_with_the_slow_search(eos_bias, beam_size, normalize):
    for seed in range(6):
        decoder = RecurrentDecoder(VOCABULARY, FEATURES, eos_bias, seed)
        memory = make_memory(14, seed)
        found = make_search(decoder, beam_size, length_normalization=normalize)(memory)
        expected = slow_generate(
            decoder.of_prefix(memory, EOS),
            vocab_size=VOCABULARY,
            beam_size=beam_size,
            eos=EOS,
            most=14,
            normalize=normalize,
        )
        assert [hypothesis.yseq.tolist() for hypothesis in found] == [
            [EOS, *tokens, EOS] for tokens, _ in expected
        ]
        for hypothesis, (_, score) in zip(found, expected, strict=True):
            assert hypothesis.score == pytest.approx(score, abs=1e-4)
            length = len(hypothesis.yseq) - 1 if normalize else 1
            if len(hypothesis.yseq) < 16:  # The last one was not told to end.
                assert hypothesis.scores["decoder"] / length == pytest.approx(score, abs=1e-4)


def test_the_rules_matter():
    """Otherwise the test above could not tell them apart."""
    differ = {}
    for seed in range(10):
        decoder, memory = RecurrentDecoder(VOCABULARY, FEATURES, 1.0, seed), make_memory(14, seed)
        texts = [
            [hypothesis.yseq.tolist() for hypothesis in make_search(decoder, 3, **options)(memory)]
            for options in ({}, {"length_normalization": True}, {"end_when_beaten": False})
        ]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            differ[one, other] = differ.get((one, other), False) or texts[one] != texts[other]
    assert all(differ.values())


@pytest.mark.parametrize("interval", [1, 3, 100])
@pytest.mark.parametrize("options", [{"length_normalization": True}, {"stop_repeats": True}])
def test_a_batch_gives_the_same_as_one_by_one(options, interval, monkeypatch):
    monkeypatch.setitem(module.STOP_TEST_INTERVAL, "cpu", interval)
    monkeypatch.setattr(module, "REPEATED_LIMIT", 5)
    monkeypatch.setattr(module, "REPEATED_NGRAM", 1)
    lengths = [17, 1, 40, 9, 26, 2]
    memories = [make_memory(frames, seed) for seed, frames in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(memories, batch_first=True, padding_value=3.0)
    search = make_search(RecurrentDecoder(VOCABULARY, FEATURES, 1.0), 4, **options)
    together = search(padded, torch.tensor(lengths))
    for memory, nbest in zip(memories, together, strict=True):
        alone = search(memory)
        assert [one.yseq.tolist() for one in nbest] == [one.yseq.tolist() for one in alone]
        assert [one.score for one in nbest] == pytest.approx([one.score for one in alone], abs=1e-4)


def test_goes_with_ctc():
    """A partial scorer keeps its state for hypotheses that the beam goes on with."""
    decoder, ctc = RecurrentDecoder(VOCABULARY, FEATURES, 1.0), LinearCTC(VOCABULARY, FEATURES)
    search = BatchBeamSearch(
        *(3, VOCABULARY, {"decoder": 0.6, "ctc": 0.4}),
        {"decoder": decoder, "ctc": CTCPrefixScorer(ctc, EOS)},
        *(EOS, EOS),
        pre_beam_score_key="decoder",
        end_when_beaten=True,
    )
    memory = make_memory(12)
    best = search(memory)[0]
    scorer = CTCPrefixScorer(ctc, EOS)
    state, total = scorer.init(memory[None], torch.tensor([12]), 1), 0.0
    for last, token in zip(best.yseq[:-1], best.yseq[1:], strict=True):
        scores, state = scorer.score_partial(last[None], token[None, None], state)
        total += float(scores)
        state = scorer.reorder_partial(state, torch.tensor([0]), token[None], scores[:, 0])
    assert best.scores["ctc"] == pytest.approx(total, abs=1e-3)


class Chain(ScorerInterface):
    """Follows given tokens, and then a phrase for ever; the end symbol costs 3, others 8."""

    def __init__(self, tokens, phrase):
        self.tokens, self.phrase = tokens, phrase

    def next_token(self, step):
        if step < len(self.tokens):
            return self.tokens[step]
        return self.phrase[(step - len(self.tokens)) % len(self.phrase)] if self.phrase else EOS

    def init(self, memory, memory_lengths, beam_size):
        return torch.zeros(len(memory_lengths) * beam_size, dtype=torch.int64)

    def score(self, tokens, state):
        scores = torch.full((len(tokens), VOCABULARY), -8.0)
        scores[:, EOS] = -3.0
        scores[range(len(tokens)), [self.next_token(step) for step in state.tolist()]] = -0.01
        return scores, state + 1

    def reorder(self, state, index):
        return state[index]


@pytest.mark.parametrize("phrase", [[1], [1, 2], [4, 3, 2, 1, 5, 6, 7]])
def test_a_loop_is_cut_off(phrase):
    chain = Chain([8, 9], phrase)
    (looping,) = make_search(chain, 1)(torch.zeros(200, 1))
    assert len(looping.yseq) == 202
    (best,) = make_search(chain, 1, stop_repeats=True)(torch.zeros(200, 1))
    assert best.yseq.tolist() == [EOS, 8, 9, *phrase, EOS]
    assert best.score == pytest.approx(-0.01 * (2 + len(phrase)))


def test_a_loop_that_varies_is_cut_off():
    """As beams make them, which go around exact copies."""
    one, other = [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 9]
    chain = Chain([*one, *other], [*one, *one, *other])
    (best,) = make_search(chain, 1, stop_repeats=True)(torch.zeros(200, 1))
    assert len(best.yseq) <= 2 + 2 * len(one)
    assert best.yseq[1:9].tolist() == one


def test_what_ends_by_itself_comes_before_what_was_stopped():
    """Though the loop scores better."""
    nbest = make_search(Chain([8], [1, 2]), 2, stop_repeats=True)(torch.zeros(80, 1))
    assert nbest[0].yseq.tolist() in ([EOS, EOS], [EOS, 8, EOS])
    assert nbest[0].scores["decoder"] <= -3.0


@pytest.mark.parametrize(
    "text", [[1, 2, 3, 4] * 7, [5] * 27, [1, 2, 3, 4, 5, 6, 7, 8] * 3 + [9]], ids=len
)
def test_short_repetitions_are_left_alone(text):
    (best,) = make_search(Chain(text, []), 1, stop_repeats=True)(torch.zeros(200, 1))
    assert best.yseq.tolist() == [EOS, *text, EOS]


def test_scores_per_token_need_the_rule():
    with pytest.raises(ValueError, match="length_normalization needs end_when_beaten"):
        make_search(StepScorer([[0.0]]), 2, end_when_beaten=False, length_normalization=True)
