"""Units of waveforms, and what the front-ends on them share."""

from torch import Tensor

from espnet.nets.pytorch_backend.nets_utils import padding_mask, zero_padding

SAMPLE_RATE = 16000
SAMPLES_PER_FRAME = 640  # at 25 frames a second


def cut_to_frames(
    x: Tensor, lengths: Tensor, samples_per_frame: int = SAMPLES_PER_FRAME
) -> tuple[Tensor, Tensor]:
    """Leaves out the samples beyond the last full frame.

    Args:
        x: Waveforms, (B, S, 1).
        lengths: Samples, (B,).
        samples_per_frame: Samples of a frame.

    Returns:
        Waveforms, (B, S', 1), S' a multiple of `samples_per_frame`, zero beyond an utterance's
        last full frame, and the number of frames of each, (B,).
    """
    frames = lengths // samples_per_frame
    x = x[:, : x.size(1) // samples_per_frame * samples_per_frame]
    return zero_padding(x, padding_mask(frames * samples_per_frame, x.size(1))), frames
