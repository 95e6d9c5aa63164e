"""The scorers, and what their interface promises."""

import numpy as np
import pytest
import torch
from slow_beam_search import SlowCTC

from espnet.nets.scorer_interface import PartialScorerInterface, ScorerInterface
from espnet.nets.scorers.ctc import CTCPrefixScorer
from espnet.nets.scorers.length_bonus import LengthBonus

VOCABULARY = 9
EOS = VOCABULARY - 1


class IdentityCTC:
    """Takes the encoder output for logits."""

    def __init__(self):
        self.calls = 0

    def log_softmax(self, memory):
        self.calls += 1
        return memory.log_softmax(-1)


def test_ctc_scores_candidates_and_vocabulary_alike():
    torch.manual_seed(0)
    memory, lengths = 3 * torch.randn(2, 10, VOCABULARY), torch.tensor([10, 6])
    ctc = IdentityCTC()
    scorer = CTCPrefixScorer(ctc, EOS)
    assert isinstance(scorer, PartialScorerInterface)
    slow = [
        SlowCTC(one[:length].log_softmax(-1).double().numpy(), 0, EOS)
        for one, length in zip(memory, lengths.tolist(), strict=True)
    ]
    partial = full = scorer.init(memory, lengths, 2)
    prefixes = [(), (), (), ()]
    tokens, totals = torch.full((4,), EOS), torch.zeros(4)
    everything = torch.arange(VOCABULARY).expand(4, -1)
    for chosen, index in (([1, 2, 3, 4], [0, 1, 2, 3]), ([1, 5, 3, 3], [1, 0, 3, 2])):
        scores, partial = scorer.score_partial(tokens, everything, partial)
        scores_full, full = scorer.score(tokens, full)
        expected = [slow[row // 2].prefix_scores(prefix) for row, prefix in enumerate(prefixes)]
        expected = torch.tensor(np.stack(expected)).float() - totals[:, None]
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(scores_full, expected, atol=1e-4, rtol=1e-5)
        index, tokens = torch.tensor(index), torch.tensor(chosen)
        gains = scores[index, tokens]
        totals = totals[index] + gains
        prefixes = [(*prefixes[row], token) for row, token in zip(index, chosen, strict=True)]
        partial = scorer.reorder_partial(partial, index, tokens, gains)
        full = scorer.reorder_partial(full, index, tokens, gains)
    assert ctc.calls == 1


@pytest.mark.parametrize("method", ["score", "score_partial"])
def test_ctc_goes_on_without_finished_utterances(method):
    torch.manual_seed(0)
    memory, lengths = torch.randn(3, 8, VOCABULARY), torch.tensor([8, 5, 7])
    scorer = CTCPrefixScorer(IdentityCTC(), EOS)

    def score(state, tokens):
        if method == "score":
            return scorer.score(tokens, state)
        return scorer.score_partial(tokens, torch.arange(VOCABULARY).expand(len(tokens), -1), state)

    scores, state = score(scorer.init(memory, lengths, 2), torch.full((6,), EOS))
    index, tokens = torch.tensor([0, 1, 4, 5]), torch.tensor([3, 4, 5, 6])
    state = scorer.reorder_partial(state, index, tokens, scores[index, tokens])
    together, _ = score(state, tokens)
    for position, utterance in enumerate((0, 2)):
        length = lengths[utterance : utterance + 1]
        alone = scorer.init(memory[utterance : utterance + 1, : int(length)], length, 2)
        scores, state = score(alone, torch.full((2,), EOS))
        own = tokens[2 * position : 2 * position + 2]
        rows = torch.arange(2)
        state = scorer.reorder_partial(state, rows, own, scores[rows, own])
        expected, _ = score(state, own)
        torch.testing.assert_close(together[2 * position : 2 * position + 2], expected)


def test_length_bonus_is_one_for_every_token():
    scorer = LengthBonus(VOCABULARY)
    state = scorer.init(torch.zeros(2, 3, 4), torch.tensor([3, 2]), 5)
    scores, state = scorer.score(torch.zeros(10, dtype=torch.int64), state)
    torch.testing.assert_close(scores, torch.ones(10, VOCABULARY))
    state = scorer.reorder(state, torch.arange(5))
    assert scorer.score(torch.zeros(5, dtype=torch.int64), state)[0].shape == (5, VOCABULARY)


@pytest.mark.parametrize(
    ("interface", "methods"),
    [
        (ScorerInterface, ["init", "reorder", "score"]),
        (PartialScorerInterface, ["init", "reorder_partial", "score", "score_partial"]),
    ],
)
def test_a_scorer_that_lacks_a_method_cannot_be_defined(interface, methods):
    own = {method: lambda: None for method in methods}
    type("Scorer", (interface,), own)()
    for method in methods:
        others = {name: value for name, value in own.items() if name != method}
        with pytest.raises(TypeError, match=f"Scorer lacks {method}: see .*ScorerInterface"):
            type("Scorer", (interface,), others)
