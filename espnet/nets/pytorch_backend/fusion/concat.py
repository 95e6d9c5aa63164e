"""Fusion by concatenation."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from espnet.nets.pytorch_backend.fusion.interface import FusionInterface


class ConcatFusion(FusionInterface, nn.Linear):
    """Concatenates the features of the streams and projects them, as auto_avsr does.

    Args:
        widths: Features of each stream, in the order in which they are concatenated.
        adim: Features D of what comes out.
    """

    def __init__(self, widths: Mapping[str, int], adim: int) -> None:
        nn.Linear.__init__(self, sum(widths.values()), adim)
        self.streams = tuple(widths)

    def pass_on_last(self) -> None:
        """See `FusionInterface`."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
            self.weight[:, -self.out_features :].fill_diagonal_(1.0)

    def forward(self, features: Mapping[str, Tensor], lengths: Tensor) -> Tensor:  # noqa: ARG002
        """Concatenates and projects. See `FusionInterface`."""
        return nn.Linear.forward(self, torch.cat([features[s] for s in self.streams], dim=-1))
