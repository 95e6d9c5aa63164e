"""What the pretrained front-ends on waveforms share."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from espnet.nets.pytorch_backend.frontend.pretrained_encoder import PretrainedEncoder
from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.pytorch_backend.pretrained import enable_gradient_checkpointing
from espnet.nets.pytorch_backend.real_frames import RealFrames

SAMPLES_PER_FEATURE = 320  # 50 features a second


class WaveEncoder(PretrainedEncoder):
    """Encodes waveforms.

    Args:
        backbone: Audio model of transformers.
        gradient_checkpointing: Whether layers with trained weights are computed again for their
            gradients.
        **options: As for `PretrainedEncoder`.
    """

    frame_rate = 50

    def __init__(
        self, backbone: PreTrainedModel, *, gradient_checkpointing: bool = True, **options: Any
    ) -> None:
        super().__init__(backbone, **options)
        if gradient_checkpointing:  # It takes place in layers in training mode only.
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
        x = x[:, : int(lengths.max())]
        real = RealFrames.of(lengths, x)
        if not real.ragged:
            return self.encode(x.squeeze(-1), lengths, frames), frames
        order = lengths.argsort(descending=True)  # as blocks of attention want them
        waves = real.clear(x).squeeze(-1)[send(order, x.device)]
        features = self.encode(waves, lengths[order], frames[order])
        return features[send(order.argsort(), x.device)], frames

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Features of waveforms of given lengths in samples."""
        raise NotImplementedError

    def encode(self, waves: Tensor, samples: Tensor, frames: Tensor) -> Tensor:
        """Encodes waveforms.

        Args:
            waves: (B, S), longest first, zero where padded.
            samples: Real samples, (B,).
            frames: Features of each, (B,).

        Returns:
            Features, (B, T, D), zero where padded, T that of the longest.
        """
        raise NotImplementedError
