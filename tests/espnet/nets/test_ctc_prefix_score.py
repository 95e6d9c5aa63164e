"""CTC prefix scores against a recursion over frames."""

import numpy as np
import pytest
import torch
from slow_beam_search import SlowCTC

from espnet.nets.ctc_prefix_score import (
    extend_prefixes,
    score_candidates,
    score_vocabulary,
    start_prefixes,
)

BLANK = 0
VOCABULARY = 12
EOS = VOCABULARY - 1


def make_posteriors(kind, frames, seed=0):
    """Return log-posteriors (T, V), float32."""
    rng = np.random.RandomState(seed)
    logits = rng.standard_normal((frames, VOCABULARY))
    if kind == "flat":
        logits *= 0.1
    elif kind == "random":
        logits *= 5
    elif kind == "peaky":  # a token every eight frames, blanks with certainty between them
        logits[:, BLANK] += 20
        for start in range(0, frames, 8):
            logits[min(start + 3, frames - 1), rng.randint(1, EOS)] += 40
    elif kind == "extreme":  # up to 100 nats a frame, and impossible tokens
        logits *= 30
    posteriors = torch.tensor(logits, dtype=torch.float32).log_softmax(-1)
    if kind == "extreme":
        posteriors[:, 5] = -torch.inf
        posteriors[::3, 6] = -1e4
    return posteriors


def draw_prefix(slow, length, seed):
    """Return likely, less likely and repeated tokens."""
    rng = np.random.RandomState(seed)
    prefix, score = (), 0.0
    while len(prefix) < length:
        scores = slow.prefix_scores(prefix)
        scores[EOS] = -np.inf
        token = int(np.argsort(-scores)[rng.randint(3)])
        if prefix and rng.rand() < 0.25:
            token = prefix[-1]
        if scores[token] - score < -500:
            break
        prefix, score = (*prefix, token), scores[token]
    return prefix


def score_all(state, last_tokens, by_vocabulary):
    if by_vocabulary:
        return score_vocabulary(state, last_tokens, state.emissions.double().exp())
    everything = torch.arange(VOCABULARY).expand(len(last_tokens), -1)
    return score_candidates(state, last_tokens, everything)


@pytest.mark.parametrize("by_vocabulary", [False, True])
@pytest.mark.parametrize("kind", ["flat", "random", "peaky", "extreme"])
@pytest.mark.parametrize("frames", [1, 2, 30, 500])
def test_scores_of_a_growing_prefix(kind, frames, by_vocabulary):
    posteriors = make_posteriors(kind, frames, seed=frames)
    slow = SlowCTC(posteriors.double().numpy(), BLANK, EOS)
    state = start_prefixes(posteriors[None], torch.tensor([frames]), 1, BLANK, EOS)
    last = torch.tensor([EOS])
    prefix = draw_prefix(slow, 25, seed=frames)
    for length in range(len(prefix) + 1):
        expected = slow.prefix_scores(prefix[:length])
        total = state.scores.item()
        gains = score_all(state, last, by_vocabulary)
        assert gains.dtype == torch.float32
        likely = expected - total > -600
        # The gain is a float32; near the prefix score, where hypotheses live, it is this exact.
        np.testing.assert_allclose(
            gains[0].numpy()[likely], (expected - total)[likely], rtol=2e-6, atol=1e-5
        )
        impossible = ~np.isfinite(expected)
        np.testing.assert_array_equal(gains[0].numpy()[impossible], -np.inf)
        if length < len(prefix):
            token = torch.tensor([prefix[length]])
            gain = gains[:, prefix[length]]
            state = extend_prefixes(state, last, torch.tensor([0]), token, gain)
            assert state.scores.item() == pytest.approx(expected[token.item()], abs=1e-3, rel=1e-6)
            last = token


def test_the_probabilities_of_all_sequences_sum_to_one():
    posteriors = make_posteriors("random", 3)[:, :4].clone()
    posteriors[:, 3] = -torch.inf  # the end symbol is no label of CTC
    posteriors = posteriors.log_softmax(-1)
    totals = []

    def visit(state, last, total):
        gains = score_candidates(state, last, torch.arange(4)[None])[0]
        totals.append(total + gains[3].item())
        for token in (1, 2):
            if gains[token] > -torch.inf:
                chosen = torch.tensor([token])
                longer = extend_prefixes(
                    state, last, torch.tensor([0]), chosen, gains[token : token + 1]
                )
                visit(longer, chosen, total + gains[token].item())

    visit(start_prefixes(posteriors[None], torch.tensor([3]), 1, 0, 3), torch.tensor([3]), 0.0)
    assert torch.tensor(totals).exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("padding", [0.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("by_vocabulary", [False, True])
def test_a_batch_with_padding_reordering_and_left_out_utterances(by_vocabulary, padding):
    beam = 3
    lengths = [9, 1, 20, 4]
    utterances = [make_posteriors("random", frames, seed=frames) for frames in lengths]
    slow = [SlowCTC(one.double().numpy(), BLANK, EOS) for one in utterances]
    padded = torch.nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=padding)
    state = start_prefixes(padded, torch.tensor(lengths), beam, BLANK, EOS)
    prefixes = [[()] * beam for _ in lengths]
    last = torch.full((len(lengths) * beam,), EOS)
    rng = np.random.RandomState(0)
    for step in range(6):
        gains = score_all(state, last, by_vocabulary)
        assert not gains.isnan().any()
        if step == 3:
            del slow[2], prefixes[2]
            kept = [0, 1, 3]
        else:
            kept = list(range(len(slow)))
        rows, tokens = [], []
        for position, place in enumerate(kept):
            old = prefixes[position]
            expected = np.stack([slow[position].prefix_scores(prefix) for prefix in old])
            got = gains[place * beam : (place + 1) * beam] + state.scores[place][:, None]
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(np.isfinite(got.numpy()), finite)
            np.testing.assert_allclose(got.numpy()[finite], expected[finite], rtol=1e-5, atol=1e-4)
            parents = rng.randint(beam, size=beam)
            chosen = rng.randint(1, EOS, size=beam)
            prefixes[position] = [
                (*old[parent], int(token)) for parent, token in zip(parents, chosen, strict=True)
            ]
            rows += [place * beam + int(parent) for parent in parents]
            tokens += chosen.tolist()
        index, new = torch.tensor(rows), torch.tensor(tokens)
        state = extend_prefixes(state, last, index, new, gains[index, new])
        last = new


def test_hypotheses_that_are_over_never_turn_into_nan():
    posteriors = make_posteriors("random", 5)[None]
    state = start_prefixes(posteriors, torch.tensor([5]), 1, BLANK, EOS)
    last = torch.tensor([EOS])
    for token in (3, EOS, BLANK, 2, 2, 2, 2, 2, EOS, 1):
        chosen = torch.tensor([token])
        gain = score_candidates(state, last, chosen[None])[:, 0]
        assert not gain.isnan().any()
        state = extend_prefixes(state, last, torch.tensor([0]), chosen, gain)
        last = chosen
