"""Fusion by concatenation."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ConcatFusion(nn.Linear):
    """Concatenates the features of the streams and projects them, as auto_avsr does.

    Args:
        widths: Features of each stream, in the order in which they are concatenated.
        adim: Features D of what comes out.
    """

    def __init__(self, widths: Mapping[str, int], adim: int) -> None:
        super().__init__(sum(widths.values()), adim)
        self.streams = tuple(widths)

    def pass_on_last(self) -> None:
        """Makes it give the last D of the concatenated features as they are."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.zero_()
            self.weight[:, -self.out_features :].fill_diagonal_(1.0)

    def forward(self, features: Mapping[str, Tensor], lengths: Tensor) -> Tensor:  # noqa: ARG002
        """Fuses.

        Args:
            features: Of each stream, (B, T, D of the stream), padded with anything.
            lengths: Real frames, (B,), on the host: for fusions over time.

        Returns:
            Fused features, (B, T, D).
        """
        return super().forward(torch.cat([features[s] for s in self.streams], dim=-1))
