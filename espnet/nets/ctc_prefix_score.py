"""CTC prefix scores of many hypotheses at once, without a loop over frames.

Source: Watanabe et al., "Hybrid CTC/Attention Architecture for End-to-End Speech Recognition", IEEE
JSTSP 11(8), 2017, algorithm 2. With x_t the log-posterior of a token in frame t (y_t that of the
blank) and, for a prefix g, phi_t(g) the log-probability that frames 1 to t emit exactly g:

- The prefix g extended by a token has the prefix score psi = logsumexp_t(phi_{t-1}(g) + x_t).
- Its paths that end in the token obey r_t = logaddexp(r_{t-1}, phi_{t-1}(g)) + x_t, that is
  r_t = X_t + logcumsumexp_t(phi_{t-1}(g) - X_{t-1}) with X the cumulative sum of x.
- All its paths: phi_t = logaddexp(r_t, phi_{t-1} + y_t) = Y_t + logcumsumexp_t(r_t - Y_t). The
  second term in the logaddexp are the paths that end in the blank. A token that repeats the last
  one of g needs a blank between, so for it these stand in for phi_t(g).

Only the hypotheses that the search keeps go through the recursion; a candidate token costs one
logsumexp. The recursion runs in float64: X reaches -10,000 over 500 frames, where float32 resolves
1e-3, and the differences of such sums are what counts. It is small, (N, T). The candidates,
(N, P, T), are scored in float32 after subtraction of the prefix score, so the ones that matter lie
near 0. Against a float64 recursion over frames, candidates within 50 of the prefix score are exact
to 4e-6 up to 500 frames; with the recursion in float32 too, they are to 5e-3.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.scorer_interface import kept_utterances

IMPOSSIBLE = -1e5
"""Stands in for a log-posterior of minus infinity in cumulative sums, whose differences matter."""


class CTCPrefixState(NamedTuple):
    """The prefixes of N = B * K hypotheses; time index t = 0 .. T counts the frames used.

    Attributes:
        first_rows: Row of an utterance's first token in the emissions of all, end to end (B, 1).
        emissions: Log-posterior of each token in the frame after t frames (B, V, T + 1). Minus
            infinity for the blank and beyond the utterance; the end symbol emits for free after
            the last frame and nowhere else, which makes its prefix score the total probability.
        blanks: Log-posterior of the blank in frame t, y_t (B, 1, T + 1), 0 for t = 0, float64.
        blank_sums: Its cumulative sum Y_t, likewise.
        paths: phi_t of each prefix, and its part that ends in the blank (B, K, 2, T + 1), float64.
        scores: Prefix scores psi (B, K), float64.
    """

    first_rows: torch.Tensor
    emissions: torch.Tensor
    blanks: torch.Tensor
    blank_sums: torch.Tensor
    paths: torch.Tensor
    scores: torch.Tensor


def start_prefixes(
    log_posteriors: torch.Tensor, lengths: torch.Tensor, beam_size: int, blank: int, eos: int
) -> CTCPrefixState:
    """Make K empty prefixes for each utterance.

    Args:
        log_posteriors: CTC log-posteriors (B, T, V), padded at the end.
        lengths: Frames of each utterance (B,), int64, on the host.
        beam_size: Hypotheses per utterance, K.
        blank: Id of the blank.
        eos: Id of the end symbol.

    Returns:
        The state of the empty prefixes.
    """
    frames_used = torch.arange(log_posteriors.size(1) + 1, device=log_posteriors.device)
    lengths = send(lengths, log_posteriors.device)[:, None]  # (B, 1)
    # (B, T, V) -> (B, V, T + 1), tokens first so that a candidate's frames lie side by side
    emissions = functional.pad(log_posteriors.float().transpose(1, 2), (0, 1)).contiguous()
    emissions.masked_fill_((frames_used >= lengths)[:, None], -torch.inf)
    emissions[:, blank] = -torch.inf
    emissions[:, eos].fill_(-torch.inf).masked_fill_(frames_used == lengths, 0.0)

    blanks = functional.pad(log_posteriors[:, :, blank].double(), (1, 0)).clamp(min=IMPOSSIBLE)
    blanks = blanks.masked_fill(frames_used > lengths, 0.0)[:, None]  # (B, T + 1) -> (B, 1, T + 1)
    blank_sums = blanks.cumsum(-1)
    # The empty prefix has nothing but paths of blanks, and no token repeats its last one.
    paths = blank_sums[:, :, None].repeat(1, beam_size, 2, 1)
    scores = paths.new_zeros(paths.shape[:2])
    first_rows = torch.arange(len(emissions), device=emissions.device)[:, None] * emissions.size(1)
    return CTCPrefixState(first_rows, emissions, blanks, blank_sums, paths, scores)


def score_candidates(
    state: CTCPrefixState, last_tokens: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    """Score the extension of each prefix by each of its candidates.

    Args:
        state: The prefixes.
        last_tokens: Last token of each prefix (N,); any token if it is empty.
        candidates: Tokens (N, P).

    Returns:
        psi of the extended prefix minus psi of the prefix (N, P), float32.
    """
    paths = _relative_paths(state)[:, :, None]  # (N, 2, 1, T + 1)
    repeats = (candidates == last_tokens[:, None])[..., None]  # (N, P, 1)
    before = torch.where(repeats, paths[:, 1], paths[:, 0])  # (N, P, T + 1)
    return _logsumexp(before.add_(_emission_rows(state, candidates)))


def score_vocabulary(
    state: CTCPrefixState, last_tokens: torch.Tensor, probabilities: torch.Tensor
) -> torch.Tensor:
    """Score the extension of each prefix by each token, as one matrix product.

    Sums of probabilities in float64 are as exact as in the logarithmic domain as long as an
    extension is more likely than e^-700; less likely ones count as impossible.

    Args:
        state: The prefixes.
        last_tokens: Last token of each prefix (N,); any token if it is empty.
        probabilities: ``state.emissions.double().exp()`` (B, V, T + 1).

    Returns:
        psi of the extended prefix minus psi of the prefix (N, V), float32.
    """
    paths = _relative_paths(state)
    batch, beam = state.scores.shape
    before = paths[:, 0].double().exp().view(batch, beam, -1)  # (N, T + 1) -> (B, K, T + 1)
    scores = torch.matmul(before, probabilities.transpose(1, 2)).log().float()  # (B, K, V)
    last_tokens = last_tokens[:, None]
    repeated = _logsumexp(paths[:, 1, None] + _emission_rows(state, last_tokens))  # (N, 1)
    return scores.view(batch * beam, -1).scatter(1, last_tokens, repeated)


def extend_prefixes(
    state: CTCPrefixState,
    last_tokens: torch.Tensor,
    index: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
) -> CTCPrefixState:
    """Keep some prefixes, each extended by a token.

    Args:
        state: The prefixes.
        last_tokens: Last token of each prefix (N,), as in scoring.
        index: Row of the prefix that each new one extends (N',); utterances may be left out.
        tokens: The extending tokens (N',).
        scores: What scoring gave those (N',).

    Returns:
        The state of the new prefixes.
    """
    beam = state.scores.size(1)
    new_scores = (state.scores.flatten()[index] + scores).view(-1, beam)
    repeats = tokens == last_tokens[index]
    before = state.paths.flatten(0, 2).index_select(0, 2 * index + repeats)
    before = before.view(*new_scores.shape, -1)  # (N', T + 1) -> (B', K, T + 1)
    if index.numel() < last_tokens.numel():
        kept = kept_utterances(index, beam)
        constants = (state.emissions[kept], state.blanks[kept], state.blank_sums[kept])
        state = CTCPrefixState(state.first_rows[: len(kept)], *constants, before, new_scores)

    emissions = _emission_rows(state, tokens[:, None]).view_as(before)
    emissions = emissions.double().clamp(min=IMPOSSIBLE)
    emitted = emissions.cumsum(-1)  # X_{t+1}
    ends_in_token = emitted + torch.logcumsumexp(before - (emitted - emissions), dim=-1)
    ends_in_token = _one_frame_later(ends_in_token)
    all_paths = state.blank_sums + torch.logcumsumexp(ends_in_token - state.blank_sums, dim=-1)
    ends_in_blank = _one_frame_later(all_paths) + state.blanks
    paths = torch.stack((all_paths, ends_in_blank), dim=2)  # 2 of (B, K, T+1) -> (B, K, 2, T+1)
    return state._replace(paths=paths, scores=new_scores)


def _relative_paths(state: CTCPrefixState) -> torch.Tensor:
    """Return the paths less their prefix's score (N, 2, T + 1), float32."""
    # An impossible prefix stays impossible whatever is subtracted.
    scores = state.scores.nan_to_num(neginf=0.0)[:, :, None, None]
    return (state.paths - scores).float().flatten(0, 1)


def _emission_rows(state: CTCPrefixState, tokens: torch.Tensor) -> torch.Tensor:
    """Look up the emissions of tokens (N, P), given per hypothesis: (N, P, T + 1), float32."""
    rows = tokens.reshape(len(state.emissions), -1) + state.first_rows  # (N, P) -> (B, K * P)
    emissions = state.emissions.flatten(0, 1).index_select(0, rows.flatten())
    return emissions.view(*tokens.shape, -1)


def _logsumexp(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis; overwrites ``values``.

    Terms below e^-80 of the largest are lost in float32 anyway. Raised to that, they spare the
    denormal numbers in which ``torch.logsumexp`` takes seven times as long on a CPU.
    """
    largest = values.amax(-1)
    values -= largest.nan_to_num(neginf=0.0)[..., None]
    return values.clamp_(min=-80.0).exp_().sum(-1).log_() + largest


def _one_frame_later(paths: torch.Tensor) -> torch.Tensor:
    """Shift the last axis by one; nothing is possible before the first frame."""
    return functional.pad(paths[..., :-1], (1, 0), value=-torch.inf)
