"""CTC prefix scores as a scorer of the beam search."""

from typing import NamedTuple, Protocol

import torch

from espnet.nets.ctc_prefix_score import (
    CTCPrefixState,
    extend_prefixes,
    score_candidates,
    score_vocabulary,
    start_prefixes,
)
from espnet.nets.pytorch_backend.encoded import Video, join_video
from espnet.nets.scorer_interface import PartialScorerInterface, kept_utterances


class LogPosteriors(Protocol):
    """A CTC output layer."""

    def log_softmax(self, memory: torch.Tensor) -> torch.Tensor:
        """Map encoder output (B, T, D) to log-posteriors (B, T, V)."""


class CTCScorerState(NamedTuple):
    """State of the CTC scorer.

    Attributes:
        prefixes: The prefixes of the hypotheses.
        last_tokens: Their last tokens (N,); None before the first scoring.
        probabilities: Emission probabilities (B, V, T + 1), float64; None until the whole
            vocabulary is scored.
    """

    prefixes: CTCPrefixState
    last_tokens: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None


class CTCPrefixScorer(PartialScorerInterface):
    """Scores tokens by the probability that CTC gives to the prefixes which they complete.

    Args:
        ctc: CTC output layer, with ``log_softmax``.
        eos: Id of the end symbol. It scores the total probability of the hypothesis.
        blank: Id of the blank, which is never a next token.
    """

    def __init__(self, ctc: LogPosteriors, eos: int, blank: int = 0) -> None:
        self.ctc = ctc
        self.eos = eos
        self.blank = blank

    def init(
        self,
        memory: torch.Tensor,
        memory_lengths: torch.Tensor,
        beam_size: int,
        video: Video | None = None,
    ) -> CTCScorerState:
        """Compute the posteriors of the utterances, once, and start with empty prefixes."""
        log_posteriors = self.ctc.log_softmax(join_video(memory, video))
        prefixes = start_prefixes(log_posteriors, memory_lengths, beam_size, self.blank, self.eos)
        return CTCScorerState(prefixes)

    def score(
        self, tokens: torch.Tensor, state: CTCScorerState
    ) -> tuple[torch.Tensor, CTCScorerState]:
        """Score the whole vocabulary; see the interface."""
        probabilities = state.probabilities
        if probabilities is None:
            probabilities = state.prefixes.emissions.double().exp()
        scores = score_vocabulary(state.prefixes, tokens, probabilities)
        return scores, CTCScorerState(state.prefixes, tokens, probabilities)

    def score_partial(
        self, tokens: torch.Tensor, candidates: torch.Tensor, state: CTCScorerState
    ) -> tuple[torch.Tensor, CTCScorerState]:
        """Score the candidates; see the interface."""
        scores = score_candidates(state.prefixes, tokens, candidates)
        return scores, state._replace(last_tokens=tokens)

    def reorder_partial(
        self, state: CTCScorerState, index: torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor
    ) -> CTCScorerState:
        """Extend the kept hypotheses by their tokens; see the interface."""
        prefixes = extend_prefixes(state.prefixes, state.last_tokens, index, tokens, scores)
        probabilities = state.probabilities
        if probabilities is not None and prefixes.scores.size(0) < probabilities.size(0):
            beam = prefixes.scores.size(1)
            probabilities = probabilities[kept_utterances(index, beam)]
        return CTCScorerState(prefixes, probabilities=probabilities)
