"""What a decoder is: scores of next tokens, for training at once, for a search one by one."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from espnet.nets.pytorch_backend.encoded import Video
from espnet.nets.pytorch_backend.nets_utils import FreezableModule
from espnet.nets.scorer_interface import ScorerInterface, kept_utterances

State = TypeVar("State")


class DecoderInterface(FreezableModule, ScorerInterface, abstract=True):
    """Scores tokens after given ones, and after the encoder's output.

    Padding of memory and tokens, whatever it holds, changes nothing. Frozen parts stay in eval
    mode. In a search it is a scorer: `init`, `score` and `reorder` give what `forward` gives for
    whole sequences, but for tokens that a text never holds, which score minus infinity.

    Decoders that attend to video beside the memory take it as the keyword `video` in `features`
    and `init`.

    Attributes:
        odim: Vocabulary size V, the blank included.
        backbone: Of those with a checkpoint only: the model of transformers. Adapters go into it,
            and what is frozen of it is not saved with a run.
    """

    odim: int
    backbone: nn.Module

    @property
    @abstractmethod
    def first_token(self) -> int:
        """Id that the first column of `logits` scores; classes have it as an attribute."""

    def forward(
        self,
        tokens: Tensor,
        memory: Tensor,
        memory_lengths: Tensor,
        video: Video | None = None,
    ) -> Tensor:
        """Scores every next token of given sequences.

        Args:
            tokens: Token ids that begin with sos, (B, U), padded with eos.
            memory: Encoder output, (B, T, M), padded with anything.
            memory_lengths: Real frames, (B,), on the host.
            video: What is beside the memory, if anything is.

        Returns:
            Unnormalised scores of the tokens that follow, (B, U, V - first_token).

        Raises:
            ValueError: If the decoder has too few positions for them.
        """
        beside = {} if video is None else {"video": video}
        return self.logits(self.features(tokens, memory, memory_lengths, **beside))

    @abstractmethod
    def features(self, tokens: Tensor, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        """What `logits` scores the next tokens by, (B, U, D); as for `forward`."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Unnormalised scores by the output layer, (..., D) -> (..., V - first_token)."""

    @abstractmethod
    def max_tokens(self, frames: int) -> int:
        """Most tokens of a text, without start and end symbol, after a memory of so many frames."""


def leave_out_finished(state: State, index: Tensor, *fields: str) -> State:
    """The state of a search for the utterances that it goes on with.

    Args:
        state: Frozen dataclass with a `beam_size`.
        index: As for `reorder`.
        fields: Those of the state that hold something once an utterance: tensors, lists and tuples
            of them, None, or what has a `keep`. The first one is, or begins with, a tensor.

    Returns:
        The same state if no utterance is left out.
    """
    first = getattr(state, fields[0])
    while not isinstance(first, Tensor):
        first = first[0]
    if len(index) == len(first) * state.beam_size:
        return state
    kept = kept_utterances(index, state.beam_size)
    return replace(state, **{name: _select(getattr(state, name), kept) for name in fields})


def _select(part: Any, rows: Tensor) -> Any:
    """Some rows of what `leave_out_finished` takes."""
    if part is None:
        return None
    if isinstance(part, list | tuple):
        return type(part)(_select(each, rows) for each in part)
    return part[rows] if isinstance(part, Tensor) else part.keep(rows)
