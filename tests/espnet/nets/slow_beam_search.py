"""A slow, obvious beam search with frame-by-frame CTC prefix scores, to test the fast one against.

Source: Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", IEEE
JSTSP 11(8), 2017: algorithms 1 and 2, equation 50. All in float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class SlowCTC:
    """CTC prefix scores of one utterance: algorithm 2, frame by frame.

    Args:
        log_posteriors: (T, V), float64.
        blank: Id of the blank.
        eos: Id of the end symbol.
    """

    def __init__(self, log_posteriors: np.ndarray, blank: int, eos: int) -> None:
        self.x = log_posteriors
        self.blank = blank
        self.eos = eos
        self.tables = {}

    def prefix_scores(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Return the log-probability of the prefix extended by each token (V,)."""
        ends_in_token, ends_in_blank = self.forward(prefix)
        last = prefix[-1] if prefix else None
        scores = self.x[0].copy() if not prefix else np.full(self.x.shape[1], -np.inf)
        for t in range(1, len(self.x)):
            phi = np.full(self.x.shape[1], np.logaddexp(ends_in_token[t - 1], ends_in_blank[t - 1]))
            if last is not None:
                phi[last] = ends_in_blank[t - 1]
            scores = np.logaddexp(scores, phi + self.x[t])
        scores[self.blank] = -np.inf
        scores[self.eos] = np.logaddexp(ends_in_token[-1], ends_in_blank[-1])
        return scores

    def forward(self, prefix: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return the paths that emit the prefix, by their last symbol: 2 of (T,)."""
        if prefix not in self.tables:
            self.tables[prefix] = self._forward(prefix)
        return self.tables[prefix]

    def _forward(self, prefix):
        frames = len(self.x)
        ends_in_token = np.full(frames, -np.inf)
        if not prefix:
            return ends_in_token, np.cumsum(self.x[:, self.blank])
        before_token, before_blank = self.forward(prefix[:-1])
        ends_in_blank = np.full(frames, -np.inf)
        token = prefix[-1]
        if len(prefix) == 1:
            ends_in_token[0] = self.x[0, token]
        repeats = len(prefix) > 1 and prefix[-2] == token
        for t in range(1, frames):
            phi = before_blank[t - 1]
            if not repeats:
                phi = np.logaddexp(phi, before_token[t - 1])
            ends_in_token[t] = np.logaddexp(ends_in_token[t - 1], phi) + self.x[t, token]
            either = np.logaddexp(ends_in_blank[t - 1], ends_in_token[t - 1])
            ends_in_blank[t] = either + self.x[t, self.blank]
        return ends_in_token, ends_in_blank


class SlowHypothesis(NamedTuple):
    """A hypothesis: its tokens, weighted score, and the scores of decoder, CTC and bonus."""

    tokens: tuple[int, ...]
    score: float
    scores: dict[str, float]


def slow_search(
    decoder: Callable[[tuple[int, ...]], np.ndarray] | None,
    ctc: SlowCTC | None,
    weights: dict[str, float],
    *,
    vocab_size: int,
    beam_size: int,
    eos: int,
    pre_beam: int | None,
    most: int,
    fewest: int,
    detect_end: bool,
) -> list[SlowHypothesis]:
    """Return the ended hypotheses, best first; tokens are without start and end symbol."""
    running = [SlowHypothesis((), 0.0, {"decoder": 0.0, "ctc": 0.0, "length_bonus": 0.0})]
    ended = []
    for step in range(most):
        extended = []
        for hypothesis in running:
            decoder_scores = decoder(hypothesis.tokens) if decoder else np.zeros(vocab_size)
            candidates = set(range(vocab_size))
            if pre_beam is not None:
                candidates = {*np.argsort(-decoder_scores)[:pre_beam].tolist(), eos}
            if step < fewest:
                candidates.discard(eos)
            ctc_scores = ctc.prefix_scores(hypothesis.tokens) if ctc else np.zeros(vocab_size)
            for token in candidates:
                if ctc_scores[token] == -np.inf:
                    continue
                scores = {
                    "decoder": hypothesis.scores["decoder"] + decoder_scores[token],
                    "ctc": ctc_scores[token],
                    "length_bonus": step + 1.0,
                }
                score = sum(weights.get(name, 0.0) * value for name, value in scores.items())
                extended.append(SlowHypothesis((*hypothesis.tokens, token), score, scores))
        extended.sort(key=lambda hypothesis: -hypothesis.score)
        running = []
        for hypothesis in extended[:beam_size]:
            if hypothesis.tokens[-1] == eos:
                ended.append(hypothesis._replace(tokens=hypothesis.tokens[:-1]))
            elif step == most - 1:
                ended.append(hypothesis)
            else:
                running.append(hypothesis)
        if not running or (detect_end and _is_hopeless(ended, step)):
            break
    return sorted(ended, key=lambda hypothesis: -hypothesis.score)


def _is_hopeless(ended: list[SlowHypothesis], step: int) -> bool:
    """Return whether longer hypotheses have become too improbable to go on: equation 50."""
    best = max((hypothesis.score for hypothesis in ended), default=-math.inf)
    for shorter in range(3):
        length = step - shorter - 2  # without start and end symbol
        same = [hypothesis.score for hypothesis in ended if len(hypothesis.tokens) == length]
        if not same or max(same) - best >= -10.0:
            return False
    return True


def slow_generate(
    decoder: Callable[[tuple[int, ...]], np.ndarray],
    *,
    vocab_size: int,
    beam_size: int,
    eos: int,
    most: int,
    normalize: bool,
) -> list[tuple[tuple[int, ...], float]]:
    """Return tokens and scores of the ended hypotheses by the rules of `generate`, best first."""
    running, ended = [((), 0.0)], []
    for step in range(most):
        length = step + 1 if normalize else 1
        extended = []
        for tokens, score in running:
            scores = decoder(tokens)
            extended += [((*tokens, token), score + scores[token]) for token in range(vocab_size)]
        extended.sort(key=lambda hypothesis: -hypothesis[1])
        running = []
        for place, (tokens, score) in enumerate(extended[: 2 * beam_size]):
            if tokens[-1] != eos and step < most - 1:
                running.append((tokens, score))
            elif place < beam_size:
                ended.append((tuple(t for t in tokens if t != eos), score / length))
        ended.sort(key=lambda hypothesis: -hypothesis[1])
        running = running[:beam_size]
        if not running or (beam_size == 1 and ended):
            break
        if len(ended) >= beam_size and running[0][1] / length <= ended[beam_size - 1][1]:
            break
    return ended
