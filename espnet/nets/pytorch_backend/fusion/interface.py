"""What a fusion is: one sequence of features out of those of the streams."""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from espnet.nets.contract import Interface


class FusionInterface(nn.Module, Interface, abstract=True):
    """Fuses the features of streams at one frame rate; padding, whatever it holds, changes nothing.

    It is made from the features of each stream, by name and in their order, and the size D of what
    it gives.
    """

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor], lengths: Tensor) -> Tensor:
        """Fuses.

        Args:
            features: Of each stream, (B, T, D of the stream), padded with anything.
            lengths: Real frames, (B,), on the host: for fusions over time.

        Returns:
            Fused features, (B, T, D).
        """

    @abstractmethod
    def pass_on_last(self) -> None:
        """Makes it give the last D of the streams' features as they are, which are the audio's."""
