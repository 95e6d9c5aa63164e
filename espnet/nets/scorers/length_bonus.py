"""A bonus for every token, against the bias of the search to short hypotheses."""

import torch

from espnet.nets.pytorch_backend.encoded import Video
from espnet.nets.scorer_interface import ScorerInterface, State


class LengthBonus(ScorerInterface):
    """Scores 1 for every token, the end symbol included; its weight is the bonus.

    Args:
        vocab_size: Number of tokens, V.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def init(
        self,
        memory: torch.Tensor,
        memory_lengths: torch.Tensor,  # noqa: ARG002
        beam_size: int,  # noqa: ARG002
        video: Video | None = None,  # noqa: ARG002
    ) -> State:
        """Return the one score; nothing else is needed."""
        return torch.ones((), dtype=torch.float32, device=memory.device)

    def score(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """Return ones (N, V), without storing them."""
        return state.expand(tokens.numel(), self.vocab_size), state

    def reorder(self, state: State, index: torch.Tensor) -> State:
        """Return the state, which is the same for every hypothesis."""
        del index
        return state
