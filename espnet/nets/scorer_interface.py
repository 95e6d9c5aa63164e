"""What a scorer of the beam search is: state as tensors, one row per hypothesis.

A search holds ``N = B * K`` hypotheses, K (the beam size) for each of B utterances, and keeps them
utterance by utterance: hypothesis k of utterance b is row ``b * K + k``. Every scorer sees the rows
in this order.
"""

from abc import abstractmethod
from typing import Any

import torch

from espnet.nets.contract import Interface
from espnet.nets.pytorch_backend.encoded import Video

State = Any
"""A nested dict, list or tuple of tensors; only the scorer that made it looks into it."""


def kept_utterances(index: torch.Tensor, beam_size: int) -> torch.Tensor:
    """Utterances (B',) of the hypotheses that ``reorder`` keeps, N' = B' * K rows."""
    return index[::beam_size] // beam_size


class ScorerInterface(Interface, abstract=True):
    """Scores every token of the vocabulary as the next one of each hypothesis."""

    @abstractmethod
    def init(
        self,
        memory: torch.Tensor,
        memory_lengths: torch.Tensor,
        beam_size: int,
        video: Video | None = None,
    ) -> State:
        """Prepare the state of hypotheses that hold nothing but the start symbol.

        Args:
            memory: Encoder output (B, T, D), padded at the end.
            memory_lengths: Frames of each utterance (B,), int64, on the host.
            beam_size: Hypotheses per utterance, K.
            video: Only of models that have it beside the memory (`Encoded.video`).

        Returns:
            The state for N = B * K hypotheses.
        """

    @abstractmethod
    def score(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Score the whole vocabulary.

        Args:
            tokens: Last token of each hypothesis (N,), int64; the start symbol in the first call.
            state: What ``init``, or ``reorder`` after the last step, returned.

        Returns:
            Log-probabilities (N, V), float32, and the state that ``reorder`` takes.
        """

    @abstractmethod
    def reorder(self, state: State, index: torch.Tensor) -> State:
        """Keep some hypotheses, in a new order and perhaps several times.

        The rows of an utterance stay together: ``index.view(-1, K) // K`` is constant along each
        row. Finished utterances may be left out (then N' < N, otherwise N' = N), so what is kept
        once per utterance is selected by ``kept_utterances``.

        Args:
            state: What ``score`` returned.
            index: Row that each hypothesis continues (N',), int64.

        Returns:
            The state for N' hypotheses: row i continues row ``index[i]``.
        """


class PartialScorerInterface(ScorerInterface, abstract=True):
    """Scores given candidates, for scorers that cannot afford the whole vocabulary.

    The search calls ``score_partial`` with the candidates of its pre-beam, or ``score`` where it
    has no pre-beam, and after either ``reorder_partial`` in place of ``reorder``.
    """

    def reorder(self, state: State, index: torch.Tensor) -> State:
        """Never called: `reorder_partial` takes its place."""
        raise NotImplementedError

    @abstractmethod
    def score_partial(
        self, tokens: torch.Tensor, candidates: torch.Tensor, state: State
    ) -> tuple[torch.Tensor, State]:
        """Score some tokens as the next one of each hypothesis.

        Args:
            tokens: Last token of each hypothesis (N,), int64; the start symbol in the first call.
            candidates: Token ids to score (N, P), int64; the end symbol may be among them.
            state: What ``init``, or ``reorder_partial`` after the last step, returned.

        Returns:
            Log-probabilities (N, P), float32, and the state that ``reorder_partial`` takes.
        """

    @abstractmethod
    def reorder_partial(
        self, state: State, index: torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor
    ) -> State:
        """Keep some hypotheses, as ``reorder`` does, and extend each by its chosen token.

        Args:
            state: What ``score_partial`` or ``score`` returned.
            index: Row that each hypothesis continues (N',), int64; utterances may be left out.
            tokens: Token that extends each hypothesis (N',), int64. Rows of hypotheses that are
                over hold any token; what becomes of them does not matter.
            scores: What this scorer gave that token (N',), float32.

        Returns:
            The state for N' hypotheses.
        """
