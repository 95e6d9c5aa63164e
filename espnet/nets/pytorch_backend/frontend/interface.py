"""What a front-end is: features of one stream at a frame rate, whatever pads the batch."""

from abc import abstractmethod

from torch import Tensor, nn

from espnet.nets.contract import Interface
from espnet.nets.pytorch_backend.nets_utils import FreezableModule


class FrontendInterface(FreezableModule, Interface, abstract=True):
    """Encodes videos or waveforms.

    Padding, whatever it holds, changes nothing: features, gradients and batch statistics are those
    that utterances have alone. Frozen parts stay in eval mode.

    Attributes:
        output_dim: Size of the features, D.
        backbone: Of those with a checkpoint only: the model of transformers. Adapters go into it,
            and what is frozen of it is not saved with a run.
    """

    output_dim: int
    backbone: nn.Module

    @property
    @abstractmethod
    def frame_rate(self) -> int:
        """Features a second, 25 or 50; classes have it as an attribute."""

    @abstractmethod
    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes a batch.

        Args:
            x: Normalised grey videos at 25 frames a second, (B, T, 1, H, W), or waveforms at 16
                kHz, (B, S, 1), normalised over the utterance if the encoder's row says so.
            lengths: Frames or samples, (B,), on the host.

        Returns:
            Features, (B, T', D), zero where padded, T' at least that of the longest; their
            `output_lengths`, (B,).
        """

    @abstractmethod
    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features, (B,), of utterances of so many frames or samples, (B,)."""

    def speech_lengths(self, lengths: Tensor) -> Tensor:
        """Those of them that are not a margin of silence after the utterance."""
        return self.output_lengths(lengths)
