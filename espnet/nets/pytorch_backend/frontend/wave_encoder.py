"""What the pretrained front-ends on waveforms share."""

from abc import abstractmethod
from typing import Any

from torch import Tensor

from espnet.nets.pytorch_backend.frontend.pretrained_encoder import PretrainedEncoder
from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.pytorch_backend.pretrained import enable_gradient_checkpointing
from espnet.nets.pytorch_backend.real_frames import RealFrames

SAMPLES_PER_FEATURE = 320  # 50 features a second


class WaveEncoder(PretrainedEncoder, abstract=True):
    """Encodes waveforms.

    Args:
        name: As for `PretrainedEncoder`.
        **options: As for `PretrainedEncoder`.
    """

    frame_rate = 50

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        if self.gradient_checkpointing:  # It takes place in layers in training mode only.
            enable_gradient_checkpointing(self.backbone)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes waveforms, (B, S, 1). See `FrontendInterface`."""
        frames = self.output_lengths(lengths)
        x = x[:, : int(lengths.max())]
        real = RealFrames.of(lengths, x)
        if not real.ragged:
            return self.encode(x.squeeze(-1), lengths, frames), frames
        order = lengths.argsort(descending=True)  # as blocks of attention want them
        waves = real.clear(x).squeeze(-1)[send(order, x.device)]
        features = self.encode(waves, lengths[order], frames[order])
        return features[send(order.argsort(), x.device)], frames

    @abstractmethod
    def encode(self, waves: Tensor, samples: Tensor, frames: Tensor) -> Tensor:
        """Encodes waveforms.

        Args:
            waves: (B, S), longest first, zero where padded.
            samples: Real samples, (B,).
            frames: Features of each, (B,).

        Returns:
            Features, (B, T, D), zero where padded, T that of the longest.
        """
