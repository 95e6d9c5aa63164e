"""What the pretrained front-ends on waveforms share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from espnet.nets.pytorch_backend.frontend.pretrained_encoder import PretrainedEncoder
from espnet.nets.pytorch_backend.nets_utils import length_groups
from espnet.nets.pytorch_backend.pretrained import enable_gradient_checkpointing

SAMPLES_PER_FEATURE = 320  # 50 features a second


class WaveEncoder(PretrainedEncoder):
    """Encodes waveforms in groups of similar length, so that little work goes into padding.

    Args:
        backbone: Audio model of transformers.
        gradient_checkpointing: Whether trained layers are computed again for their gradients.
        **options: As for `PretrainedEncoder`.
    """

    frame_rate = 50

    def __init__(
        self, backbone: PreTrainedModel, *, gradient_checkpointing: bool = True, **options: Any
    ) -> None:
        super().__init__(backbone, **options)
        if gradient_checkpointing and self.trains_backbone:
            enable_gradient_checkpointing(backbone)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes waveforms.

        Args:
            x: Waveforms, (B, S, 1).
            lengths: Samples, (B,).

        Returns:
            Features, (B, T, D), zero where padded, T that of the longest; their lengths, (B,).
        """
        frames = self.output_lengths(lengths)
        groups = self._groups(lengths.tolist())
        length = int(frames.max())
        features = []
        for group in groups:
            rows = torch.tensor(group, device=x.device)
            samples = lengths[rows]
            wave = x[rows, : samples.max(), 0]
            encoded = self.encode(wave, samples, frames[rows])
            features.append(F.pad(encoded, (0, 0, 0, length - encoded.size(1))))
        order = torch.tensor(sum(groups, []), device=x.device)
        return torch.cat(features).index_select(0, order.argsort()), frames

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of waveforms of given lengths in samples."""
        raise NotImplementedError

    def encode(self, waves: Tensor, samples: Tensor, frames: Tensor) -> Tensor:
        """Encodes waveforms of similar length.

        Args:
            waves: (B, S).
            samples: Real samples, (B,), at most S.
            frames: Features of each, (B,).

        Returns:
            Features, (B, T, D), zero where padded, T that of the longest.
        """
        raise NotImplementedError

    def _groups(self, lengths: list[int]) -> list[list[int]]:
        return length_groups(lengths)
