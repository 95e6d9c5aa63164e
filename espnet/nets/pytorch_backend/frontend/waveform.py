"""Units of waveforms, and what the front-ends on them share."""

from torch import Tensor

from espnet.formats import SAMPLES_PER_FRAME
from espnet.nets.pytorch_backend.real_frames import RealFrames


def split_into_frames(x: Tensor, lengths: Tensor) -> tuple[Tensor, RealFrames]:
    """Cuts waveforms into frames, and leaves out padding and what is beyond the last full frame.

    Args:
        x: Waveforms, (B, S, 1).
        lengths: Samples, (B,).

    Returns:
        Frames, (N, 640, 1), and where they are among the B·(S // 640).
    """
    length = x.size(1) // SAMPLES_PER_FRAME
    frames = x[:, : length * SAMPLES_PER_FRAME].unflatten(1, (length, SAMPLES_PER_FRAME))
    real = RealFrames.of(lengths // SAMPLES_PER_FRAME, frames)
    return real.pack(frames), real
