"""Hypotheses of the beam search, and how they are read off the steps that it took."""

from typing import Any, NamedTuple

import torch

from espnet.nets.pytorch_backend.nets_utils import send


class Hypothesis(NamedTuple):
    """A hypothesis that has ended.

    Attributes:
        yseq: Token ids with start and end symbol (U,), int64, on the CPU.
        score: Weighted sum of the scores; with length normalisation over the tokens, the end
            symbol counted.
        scores: Unweighted score of each scorer.
    """

    yseq: torch.Tensor
    score: float
    scores: dict[str, float]

    def asdict(self) -> dict[str, Any]:
        """Return the fields as a dict of plain values."""
        return {"yseq": self.yseq.tolist(), "score": self.score, "scores": dict(self.scores)}


class SearchStep(NamedTuple):
    """What one step of the search chose, for the A utterances that were still running.

    Attributes:
        parents: Place in the previous step's beam of what each hypothesis continues (A, K).
        tokens: Token that it chose (A, K).
        ended: True where the hypothesis ended in this step (A, K).
        totals: Weighted scores (A, K).
        repeats: Tokens at the end of one that was stopped which only repeat a phrase (A, K), and
            are cut off; else 0.
        scores: Unweighted scores of the S scorers (A, S, K).
    """

    parents: torch.Tensor
    tokens: torch.Tensor
    ended: torch.Tensor
    totals: torch.Tensor
    repeats: torch.Tensor
    scores: torch.Tensor

    @staticmethod
    def join(steps: "list[SearchStep]") -> torch.Tensor:
        """All fields of L steps in one tensor (L, A, 5 + S, K), in float64, which is exact."""
        *fields, scores = (torch.stack(field).double() for field in zip(*steps, strict=True))
        return torch.cat([torch.stack(fields, dim=2), scores], dim=2)

    @classmethod
    def part(cls, joined: torch.Tensor) -> "SearchStep":
        """The fields (L, A, ...) of what `join` gave."""
        parents, tokens, ended, totals, repeats = joined[:, :, :5].unbind(2)
        return cls(
            *(parents.long(), tokens.long(), ended.bool(), totals.float(), repeats.long()),
            scores=joined[:, :, 5:].float(),
        )


class SearchHistory:
    """The steps of a search; hypotheses are kept as links to their parents until the end.

    Args:
        utterances: Number of utterances, B.
        scorer_names: Names of the S scorers.
        sos: Id of the start symbol.
        eos: Id of the end symbol.
        normalize: Whether hypotheses are compared by their score per token.
    """

    def __init__(
        self,
        utterances: int,
        scorer_names: list[str],
        sos: int,
        eos: int,
        *,
        normalize: bool = False,
    ) -> None:
        self.utterances = utterances
        self.scorer_names = scorer_names
        self.sos = sos
        self.eos = eos
        self.normalize = normalize
        self._running = torch.arange(utterances)
        self._steps: list[SearchStep] = []
        self._parts: list[torch.Tensor] = []

    def append(self, step: SearchStep) -> None:
        """Add a step; its tensors stay where they are."""
        self._steps.append(step)

    def keep(self, utterances: torch.Tensor) -> None:
        """Go on with some of the utterances.

        Args:
            utterances: Places among the running utterances (A',), int64, on the CPU.
        """
        self._store_steps()
        self._running = self._running[utterances]

    def nbest(self) -> list[list[Hypothesis]]:
        """Return the ended hypotheses of each utterance, best first.

        Those that were stopped, since they repeat a phrase, come after all others.
        """
        self._store_steps()
        nbest: list[list[Hypothesis]] = [[] for _ in range(self.utterances)]
        if not self._parts:
            return nbest
        history = SearchStep.part(torch.cat(self._parts).cpu())
        # (L, B, K) -> (E,) for each of the coordinates, for E ended hypotheses
        step, utterance, place = history.ended.nonzero(as_tuple=True)
        repeats = history.repeats[step, utterance, place]
        for _ in range(int(repeats.max()) if repeats.numel() else 0):
            back = repeats > 0
            place = torch.where(back, history.parents[step, utterance, place], place)
            step, repeats = step - back.long(), repeats - back.long()
        stopped = history.repeats[history.ended] > 0
        totals = history.totals[step, utterance, place]
        # Start symbol, tokens up to this step, and the end symbol unless it was the last of them.
        lengths = step + 2 + (history.tokens[step, utterance, place] != self.eos)
        if self.normalize:
            totals = totals / (step + 1)
        order = totals.argsort(descending=True, stable=True)
        order = order[stopped[order].long().argsort(stable=True)]
        step, utterance, place = step[order], utterance[order], place[order]
        sequences = self._trace_back(history, step, utterance, place)
        scores = history.scores[step, utterance, :, place]  # (E, S)
        rows = (utterance, lengths[order], totals[order], scores)
        for sequence, *row in zip(sequences, *(values.tolist() for values in rows), strict=True):
            owner, length, total, scores_of_one = row
            named = dict(zip(self.scorer_names, scores_of_one, strict=True))
            nbest[owner].append(Hypothesis(sequence[:length].clone(), total, named))
        return nbest

    def _store_steps(self) -> None:
        """Put together the steps since the last change of the running utterances."""
        if not self._steps:
            return
        running = SearchStep.join(self._steps)
        everyone = running.new_zeros(running.size(0), self.utterances, *running.shape[2:])
        self._parts.append(everyone.index_copy_(1, send(self._running, running.device), running))
        self._steps = []

    def _trace_back(
        self,
        history: SearchStep,
        step: torch.Tensor,
        utterance: torch.Tensor,
        place: torch.Tensor,
    ) -> torch.Tensor:
        """Follow the links of all ended hypotheses together, from the last step to the first.

        Args:
            history: The steps, stacked (L, B, K).
            step: Step in which each hypothesis ended (E,).
            utterance: Its utterance (E,).
            place: Its place in the beam (E,).

        Returns:
            Start symbol, tokens and end symbols (E, L + 2).
        """
        steps = history.parents.size(0)
        sequences = torch.full((step.numel(), steps + 2), self.eos)
        sequences[:, 0] = self.sos
        for current in range(steps - 1, -1, -1):
            reached = step >= current
            tokens = history.tokens[current, utterance, place]
            sequences[:, current + 1] = torch.where(reached, tokens, self.eos)
            place = torch.where(reached, history.parents[current, utterance, place], place)
        return sequences
