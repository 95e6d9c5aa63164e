"""Joint CTC/attention beam search over the hypotheses of several utterances at once.

Source: Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", IEEE
JSTSP 11(8), 2017, with a pre-beam: partial scorers see the best tokens of another scorer only.
Scores by length, and the rules that go with them, are those of transformers' ``generate``.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

from espnet.nets.hypothesis import Hypothesis, SearchHistory, SearchStep
from espnet.nets.pytorch_backend.encoded import Encoded, Video
from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.scorer_interface import PartialScorerInterface, ScorerInterface, State

STOP_TEST_INTERVAL = {"cpu": 1, "cuda": 5}
"""Steps between two looks at which utterances are finished; on a GPU, looking means waiting."""

END_SCORE_MARGIN = 10.0
END_LENGTHS = 3
"""End detection: the last 3 lengths have ended hypotheses, all more than 10 below the best."""

REPEATED_NGRAM = 4
REPEATED_LIMIT = 24
REPEATED_MEMORY = 224
"""A hypothesis repeats itself where its last 4 tokens stand within the 224 before them too. It is
stopped when it has done so for 24 tokens; a token that is new makes up for two that are not."""


class _Beam(NamedTuple):
    """The hypotheses of the A utterances that are not finished, in the order of their scores.

    Attributes:
        tokens: Last tokens (A, K).
        totals: Weighted scores (A, K); minus infinity where no hypothesis is running.
        scores: Unweighted scores of the S scorers (A, S, K).
        gains: What they gave the last token (A, S, K).
        rows: Row of the hypothesis of the previous step that each one continues (A, K).
        min_lengths: Fewest tokens, without start and end symbol (A, 1).
        max_lengths: Most tokens, likewise (A, 1).
        best_ended: Score of the best hypothesis that ended in each step (A, L); with
            `end_when_beaten`, scores of the K best that have ended (A, K).
        places: Place of each hypothesis among those that the step chose (A, K).
        recent: Last R tokens, the last one first (A, K, R); -1 before the first. R is 0 unless
            repetitions are looked for.
        runs: How many of the last tokens equal those 1, 2, ... R places before them (A, K, R).
        repeated: How many of the last tokens repeat what stands before them (A, K); new ones are
            subtracted twice.
        since: Tokens since that became more than 0 (A, K).
    """

    tokens: torch.Tensor
    totals: torch.Tensor
    scores: torch.Tensor
    gains: torch.Tensor
    rows: torch.Tensor
    min_lengths: torch.Tensor
    max_lengths: torch.Tensor
    best_ended: torch.Tensor
    places: torch.Tensor
    recent: torch.Tensor
    runs: torch.Tensor
    repeated: torch.Tensor
    since: torch.Tensor

    def keep(self, utterances: torch.Tensor) -> "_Beam":
        """Leave out all utterances but those at the given places (A',)."""
        return _Beam(*(field[utterances] for field in self))


class _Expansion(NamedTuple):
    """C tokens that may come next for each of the N = A * K hypotheses.

    Attributes:
        candidates: Their ids (N, C), the end symbol last; None if they are the whole vocabulary.
        scores: Unweighted scores of each scorer (N, C).
        states: State of each scorer after scoring.
    """

    candidates: torch.Tensor | None
    scores: dict[str, torch.Tensor]
    states: dict[str, State]


class BatchBeamSearch:
    """Finds the token sequences that maximise the weighted sum of the scorers.

    Scorers of weight 0, or None, are left out. If there is a partial scorer, it scores the
    ``int(pre_beam_ratio * beam_size)`` tokens that are best by the scorer ``pre_beam_score_key``,
    and the end symbol; all other tokens are then out of the question.

    Args:
        beam_size: Hypotheses per utterance, K.
        vocab_size: Number of tokens, V.
        weights: Weight of each scorer; 0 where absent.
        scorers: The scorers by name.
        sos: Id of the start symbol.
        eos: Id of the end symbol.
        token_list: The tokens' texts, of which there must be ``vocab_size``.
        pre_beam_score_key: Name of a scorer of the whole vocabulary, "full" for the weighted sum
            of all these, or None for no pre-beam. There is none either if that scorer is left
            out, or if the pre-beam would hold the whole vocabulary.
        pre_beam_ratio: Size of the pre-beam in beam sizes.
        max_tokens: Most tokens of a hypothesis by the frames of its utterance, whatever the ratio
            of a call; None for as many as frames, unless a call says otherwise.
        end_when_beaten: Whether the search of an utterance is over when K hypotheses have ended,
            none of them worse than the best that runs (with a beam of 1, when one has), and K go
            on beside those that end, as in transformers' ``generate``; otherwise those that end
            take places in the beam, and the search is over as ``maxlenratio`` says.
        length_normalization: Whether hypotheses are compared by their score per token, the end
            symbol counted; needs `end_when_beaten`.
        stop_repeats: Whether a hypothesis that has begun to repeat itself is stopped, as
            ``REPEATED_LIMIT`` says. It counts, without the repetitions, if no other one ends.

    Raises:
        ValueError: If the beam or the pre-beam is empty.
        ValueError: If the start or end symbol is not in the vocabulary.
        ValueError: If ``token_list`` has another size than the vocabulary.
        ValueError: If a weight belongs to no scorer, or no scorer has a weight.
        ValueError: If ``pre_beam_score_key`` names no scorer of the whole vocabulary.
        ValueError: If scores per token are asked for without `end_when_beaten`.
    """

    def __init__(
        self,
        beam_size: int,
        vocab_size: int,
        weights: dict[str, float],
        scorers: dict[str, ScorerInterface | None],
        sos: int,
        eos: int,
        token_list: list[str] | None = None,
        pre_beam_score_key: str | None = None,
        pre_beam_ratio: float = 1.5,
        max_tokens: Callable[[int], int] | None = None,
        end_when_beaten: bool = False,
        length_normalization: bool = False,
        stop_repeats: bool = False,
    ) -> None:
        self.pre_beam_size = int(pre_beam_ratio * beam_size)
        if beam_size < 1 or self.pre_beam_size < 1:
            raise ValueError(
                f"beam_size {beam_size} with pre_beam_ratio {pre_beam_ratio}: both the beam and "
                "pre_beam_ratio * beam_size must be at least 1"
            )
        if not (0 <= sos < vocab_size and 0 <= eos < vocab_size):
            raise ValueError(f"sos {sos} and eos {eos} must be from 0 to {vocab_size - 1}")
        if token_list is not None and len(token_list) != vocab_size:
            raise ValueError(
                f"token_list has {len(token_list)} tokens and the vocabulary {vocab_size}: pass "
                "the list that the model was trained with"
            )
        self.max_tokens = max_tokens
        if length_normalization and not end_when_beaten:
            raise ValueError("length_normalization needs end_when_beaten: set it too")
        self.end_when_beaten = end_when_beaten
        self.length_normalization = length_normalization
        self.tail = REPEATED_MEMORY if stop_repeats else 0
        self.beam_size = beam_size
        self.vocab_size = vocab_size
        self.sos = sos
        self.eos = eos
        self.scorers, self.weights = _active_scorers(scorers, weights)
        self.partial_names = [
            name
            for name, scorer in self.scorers.items()
            if isinstance(scorer, PartialScorerInterface)
        ]
        useful = self.partial_names and self.pre_beam_size < vocab_size
        pre_beam_names = self._find_pre_beam_names(pre_beam_score_key, scorers)
        self.pre_beam_names = pre_beam_names if useful else []

    @torch.no_grad()
    def __call__(
        self,
        memory: torch.Tensor,
        memory_lengths: torch.Tensor | None = None,
        video: Video | None = None,
        *,
        maxlenratio: float = 0.0,
        minlenratio: float = 0.0,
    ) -> list[Hypothesis] | list[list[Hypothesis]]:
        """Search one utterance, or a batch, which gives the same as one by one.

        Args:
            memory: Encoder output (T, D), or (B, T, D), padded at the end.
            memory_lengths: Frames of each utterance (B,), int64, on the host; with (B, T, D) only.
            video: Beside the memory of a batch; passed on to the scorers.
            maxlenratio: Most tokens of a hypothesis, in frames of the utterance, but at least 1;
                a negative value is a number of tokens. 0 means as many as `max_tokens` says, and
                that the search ends earlier when longer hypotheses have become too improbable.
            minlenratio: Fewest tokens, in frames; a negative value is a number of tokens.

        Returns:
            All hypotheses that ended, best first, perhaps none; a list of such lists for a batch.

        Raises:
            ValueError: If ``memory`` has the wrong number of axes, or lengths are missing,
                superfluous or not one for each utterance.
        """
        if memory.dim() == 2 and memory_lengths is None:
            lengths = torch.tensor([memory.size(0)])
            encoded = Encoded(memory[None], lengths)
            return self._search(encoded, maxlenratio, minlenratio)[0]
        if memory.dim() != 3 or memory_lengths is None or memory_lengths.shape != memory.shape[:1]:
            lengths_shape = None if memory_lengths is None else tuple(memory_lengths.shape)
            raise ValueError(
                f"memory {tuple(memory.shape)} with memory_lengths {lengths_shape}: pass (T, D) "
                "alone, or (B, T, D) with (B,)"
            )
        encoded = Encoded(memory, memory_lengths, video)
        return self._search(encoded, maxlenratio, minlenratio)

    def most_tokens(self, frames: int, ratio: float = 0.0) -> int:
        """Return the most tokens of a hypothesis; none for an utterance without frames.

        Args:
            frames: Of the utterance.
            ratio: As `maxlenratio`.
        """
        most = frames if self.max_tokens is None else self.max_tokens(frames)
        if frames == 0 or ratio == 0:
            return min(frames, 1) * most
        most = sys.maxsize if self.max_tokens is None else most
        return min(most, max(1, _token_limit(frames, ratio)))

    def is_cut(self, hypothesis: Hypothesis, frames: int) -> bool:
        """Whether a hypothesis did not end by itself, but at the most tokens that it may have."""
        # The start symbol, the tokens, and the end symbol, which is added where it is missing.
        return len(hypothesis.yseq) == self.most_tokens(frames) + 2

    def _search(
        self, encoded: Encoded, maxlenratio: float, minlenratio: float
    ) -> list[list[Hypothesis]]:
        """Search a padded batch; see ``__call__``."""
        memory, memory_lengths, _ = encoded
        history = SearchHistory(
            *(memory.size(0), list(self.scorers), self.sos, self.eos),
            normalize=self.length_normalization,
        )
        frames = memory_lengths.tolist()
        max_lengths = [self.most_tokens(count, maxlenratio) for count in frames]
        min_lengths = [_token_limit(count, minlenratio) for count in frames]
        if self.max_tokens is not None:
            min_lengths = [
                min(n, self.max_tokens(f)) for n, f in zip(min_lengths, frames, strict=True)
            ]
        steps = max(max_lengths, default=0)
        if steps == 0:
            return history.nbest()
        beam = self._first_beam(memory, max_lengths, min_lengths)
        states = {
            name: scorer.init(memory, memory_lengths, self.beam_size, **encoded.beside)
            for name, scorer in self.scorers.items()
        }
        interval = STOP_TEST_INTERVAL.get(memory.device.type, STOP_TEST_INTERVAL["cuda"])
        for step in range(steps):
            expansion = self._expand(beam.tokens.flatten(), states)
            totals = self._totals(beam, expansion)
            if step < max(min_lengths):
                self._forbid_end(beam, totals, step)
            parents, beam = self._choose(beam, expansion, totals)
            over = (beam.tokens == self.eos) | (beam.max_lengths == step + 1)
            repeats = self._repeats(beam).masked_fill(over, 0)
            ended = (over | (repeats > 0)) & (beam.totals > -torch.inf)
            ended[:, self.beam_size :] = False  # These were chosen only to go on.
            history.append(
                SearchStep(parents, beam.tokens, ended, beam.totals, repeats, beam.scores)
            )
            stopped = over | (repeats > 0)
            if self.end_when_beaten:
                beam = self._close_beaten(beam, ended & over, stopped, step)
            else:
                beam = self._close(beam, ended & over, stopped, step, maxlenratio == 0)
            if step + 1 == steps:
                break
            if (step + 1) % interval == 0:
                # The one place in a step where the host waits for the device.
                flags = (beam.totals > -torch.inf).any(1).tolist()
                running = torch.tensor([row for row, runs in enumerate(flags) if runs])
                if not len(running):
                    break
                if len(running) < len(flags):
                    history.keep(running)
                    beam = beam.keep(send(running, memory.device))
            states = self._reorder(expansion.states, beam)
        return history.nbest()

    def _first_beam(
        self, memory: torch.Tensor, max_lengths: list[int], min_lengths: list[int]
    ) -> _Beam:
        """Return a beam with one hypothesis, the start symbol, for each utterance."""
        device = memory.device
        shape = (len(max_lengths), self.beam_size)
        most = send(torch.tensor(max_lengths), device)[:, None]
        totals = torch.full(shape, -torch.inf, device=device)
        totals[:, :1].masked_fill_(most > 0, 0.0)
        scores = torch.zeros(shape[0], len(self.scorers), shape[1], device=device)
        compared = self.beam_size if self.end_when_beaten else max(max_lengths)
        tail = (*shape, self.tail)
        return _Beam(
            tokens=torch.full(shape, self.sos, device=device),
            totals=totals,
            scores=scores,
            gains=scores,
            rows=torch.zeros(shape, dtype=torch.int64, device=device),
            min_lengths=send(torch.tensor(min_lengths), device)[:, None],
            max_lengths=most,
            best_ended=torch.full((shape[0], compared), -torch.inf, device=device),
            places=torch.arange(self.beam_size, device=device).expand(shape),
            recent=torch.full(tail, -1, device=device),
            runs=torch.zeros(tail, dtype=torch.int64, device=device),
            repeated=torch.zeros(shape, dtype=torch.int64, device=device),
            since=torch.zeros(shape, dtype=torch.int64, device=device),
        )

    def _expand(self, tokens: torch.Tensor, states: dict[str, State]) -> _Expansion:
        """Score the tokens that may come next.

        Args:
            tokens: Last tokens (N,).
            states: State of each scorer.

        Returns:
            The candidates with their scores, and the states after scoring.
        """
        partial_names = self.partial_names if self.pre_beam_names else []
        scores, new_states, candidates = {}, {}, None
        for name, scorer in self.scorers.items():
            if name not in partial_names:
                scores[name], new_states[name] = scorer.score(tokens, states[name])
        if self.pre_beam_names:
            candidates = self._pre_beam(scores)
            scores = {name: values.gather(1, candidates) for name, values in scores.items()}
        for name in partial_names:
            scores[name], new_states[name] = self.scorers[name].score_partial(
                tokens, candidates, states[name]
            )
        return _Expansion(candidates, scores, new_states)

    def _pre_beam(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the best tokens (N, C) by the scorers of the pre-beam, and then the end symbol."""
        names = self.pre_beam_names
        values = scores[names[0]]
        if len(names) > 1:
            values = sum(self.weights[name] * scores[name] for name in names)
        best = values.topk(self.pre_beam_size, dim=1, sorted=False).indices
        return torch.nn.functional.pad(best, (0, 1), value=self.eos)

    def _totals(self, beam: _Beam, expansion: _Expansion) -> torch.Tensor:
        """Return the weighted scores of the hypotheses with each token appended (N, C)."""
        totals = beam.totals.view(-1, 1)
        for name, scores in expansion.scores.items():
            totals = torch.add(totals, scores, alpha=self.weights[name])
        if expansion.candidates is not None:
            # The end symbol is the last candidate in any case, so it does not count elsewhere.
            duplicates = expansion.candidates[:, :-1] == self.eos
            totals[:, :-1].masked_fill_(duplicates, -torch.inf)
        return totals

    def _forbid_end(self, beam: _Beam, totals: torch.Tensor, step: int) -> None:
        """Rule the end symbol out, in place, where a hypothesis would be too short."""
        column = -1 if self.pre_beam_names else self.eos
        totals.view(*beam.totals.shape, -1)[..., column].masked_fill_(
            beam.min_lengths > step, -torch.inf
        )

    def _choose(
        self, beam: _Beam, expansion: _Expansion, totals: torch.Tensor
    ) -> tuple[torch.Tensor, _Beam]:
        """Choose the best W extensions of each utterance.

        W is K, but 2 K with `end_when_beaten`: K of them do not end.

        Args:
            beam: The hypotheses to extend.
            expansion: What they may be extended by.
            totals: Weighted scores of the extended hypotheses (N, C).

        Returns:
            Place, among those that the step before chose, of the hypothesis that each new one
            extends (A, W), and the beam of the new hypotheses, W for each utterance.
        """
        utterances, beam_size = beam.totals.shape
        columns = totals.size(1)
        chosen = beam_size * (2 if self.end_when_beaten else 1)
        best, position = totals.view(utterances, -1).topk(chosen)
        parents = position // columns
        rows = parents + torch.arange(
            0, utterances * beam_size, beam_size, device=parents.device
        ).unsqueeze(1)
        if expansion.candidates is None:
            tokens = position % columns
        else:
            tokens = expansion.candidates.view(utterances, -1).gather(1, position)
        gains = [
            expansion.scores[name].reshape(utterances, -1).gather(1, position)
            for name in self.scorers
        ]
        gains = torch.stack(gains, dim=1)  # S of (A, K) -> (A, S, K)
        scores = beam.scores.gather(2, parents[:, None].expand_as(gains)) + gains
        return beam.places.gather(1, parents), beam._replace(
            tokens=tokens,
            totals=best,
            scores=scores,
            gains=gains,
            rows=rows,
            **self._extend_tail(beam, parents, tokens),
        )

    def _extend_tail(
        self, beam: _Beam, parents: torch.Tensor, tokens: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return what is known of repetitions in hypotheses that extend those at `parents`."""
        if not self.tail:
            return {}
        index = parents[..., None].expand(-1, -1, self.tail)
        recent, runs = beam.recent.gather(1, index), beam.runs.gather(1, index)
        runs = (runs + 1) * (recent == tokens[..., None])
        is_new = (runs < REPEATED_NGRAM).all(2)
        repeated = beam.repeated.gather(1, parents) + torch.where(is_new, -2, 1)
        since = (beam.since.gather(1, parents) + 1) * (repeated > 0)
        return {
            "recent": torch.cat([tokens[..., None], recent[..., :-1]], dim=2),
            "runs": runs,
            "repeated": repeated.clamp(min=0),
            "since": since,
        }

    def _repeats(self, beam: _Beam) -> torch.Tensor:
        """Return how many tokens at the end repeat what precedes (A, W); 0 if they may go on."""
        if not self.tail:
            return torch.zeros_like(beam.tokens)
        # The first of the tokens that count ended a repetition of several.
        repeats = beam.since + (REPEATED_NGRAM - 1)
        return repeats.masked_fill(beam.repeated < REPEATED_LIMIT, 0)

    def _close_beaten(
        self, beam: _Beam, ended: torch.Tensor, stopped: torch.Tensor, step: int
    ) -> _Beam:
        """Keep the K best hypotheses that go on, if one of them may still become the best.

        Args:
            beam: The hypotheses as chosen in this step, 2 K for each utterance.
            ended: True where a hypothesis ended that counts (A, 2 K).
            stopped: True where one cannot go on (A, 2 K).
            step: Number of the step, from 0.

        Returns:
            The beam of K hypotheses, with total scores of minus infinity where nothing is running
            any more.
        """
        length = step + 1 if self.length_normalization else 1
        scores = (beam.totals / length).masked_fill(~ended, -torch.inf)
        best_ended = torch.cat([beam.best_ended, scores], dim=1).topk(self.beam_size).values
        totals, places = beam.totals.masked_fill(stopped, -torch.inf).topk(self.beam_size)
        # As in `generate`, the best that runs is compared at its present length.
        hopeless = totals[:, :1] / length <= best_ended[:, -1:]
        if self.beam_size == 1:
            hopeless = best_ended > -torch.inf
        of_tail = places[..., None].expand(-1, -1, self.tail)
        of_scores = places[:, None].expand(-1, len(self.scorers), -1)
        return beam._replace(
            tokens=beam.tokens.gather(1, places),
            totals=totals.masked_fill(hopeless, -torch.inf),
            scores=beam.scores.gather(2, of_scores),
            gains=beam.gains.gather(2, of_scores),
            rows=beam.rows.gather(1, places),
            best_ended=best_ended,
            places=places,
            recent=beam.recent.gather(1, of_tail),
            runs=beam.runs.gather(1, of_tail),
            repeated=beam.repeated.gather(1, places) if self.tail else beam.repeated,
            since=beam.since.gather(1, places) if self.tail else beam.since,
        )

    def _close(
        self,
        beam: _Beam,
        ended: torch.Tensor,
        stopped: torch.Tensor,
        step: int,
        detect_end: bool,
    ) -> _Beam:
        """Take ended hypotheses, and all of finished utterances, out of the running.

        Args:
            beam: The hypotheses as chosen in this step.
            ended: True where a hypothesis ended that counts (A, K).
            stopped: True where one cannot go on (A, K).
            step: Number of the step, from 0.
            detect_end: Whether longer hypotheses may have become too improbable to go on.

        Returns:
            The beam with total scores of minus infinity where nothing is running any more.
        """
        best = beam.totals.masked_fill(~ended, -torch.inf).amax(1)
        beam.best_ended[:, step] = best
        # A hypothesis that ends in step i has i + 2 tokens with start and end symbol, and at
        # step i those of i - 2, i - 1 and i tokens are compared with the best.
        last = step - 1
        if detect_end and last >= END_LENGTHS:
            recent = beam.best_ended[:, last - END_LENGTHS : last]
            threshold = beam.best_ended.amax(1, keepdim=True) - END_SCORE_MARGIN
            hopeless = ((recent > -torch.inf) & (recent < threshold)).all(1, keepdim=True)
            stopped = stopped | hopeless
        return beam._replace(totals=beam.totals.masked_fill(stopped, -torch.inf))

    def _reorder(self, states: dict[str, State], beam: _Beam) -> dict[str, State]:
        """Return the scorers' states for the hypotheses of the beam."""
        rows, tokens = beam.rows.flatten(), beam.tokens.flatten()
        reordered = {}
        for position, (name, scorer) in enumerate(self.scorers.items()):
            if name in self.partial_names:
                gains = beam.gains[:, position].flatten()
                reordered[name] = scorer.reorder_partial(states[name], rows, tokens, gains)
            else:
                reordered[name] = scorer.reorder(states[name], rows)
        return reordered

    def _find_pre_beam_names(
        self, key: str | None, scorers: dict[str, ScorerInterface | None]
    ) -> list[str]:
        """Return the scorers that choose the pre-beam; none if they are left out."""
        full_names = [name for name in self.scorers if name not in self.partial_names]
        if key is None:
            return []
        if key == "full":
            return full_names
        if key not in scorers or key in self.partial_names:
            raise ValueError(
                f'pre_beam_score_key {key}: expected "full", None or a scorer of the whole '
                f"vocabulary, of which there are {', '.join(full_names) or 'none'}"
            )
        return [key] if key in full_names else []


def _active_scorers(
    scorers: dict[str, ScorerInterface | None], weights: dict[str, float]
) -> tuple[dict[str, ScorerInterface], dict[str, float]]:
    """Return the scorers that count, and their weights."""
    weights = {name: float(weight) for name, weight in weights.items() if weight}
    active = {
        name: scorer for name, scorer in scorers.items() if scorer is not None and name in weights
    }
    unknown = sorted(set(weights) - set(active))
    if unknown or not active:
        raise ValueError(
            f"weights {weights} with scorers {', '.join(scorers) or 'none'}: every weight other "
            "than 0 needs its scorer, and at least one is needed"
        )
    return active, {name: weights[name] for name in active}


def _token_limit(frames: int, ratio: float) -> int:
    """Return a number of tokens from a ratio to the frames, or a negated number."""
    return int(ratio * frames) if ratio >= 0 else -int(ratio)
