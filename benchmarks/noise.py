"""Noise in place of recordings: times and memory do not depend on what is said."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import CPU
from espnet.formats import IGNORE_ID, SAMPLES_PER_FRAME, STREAMS

CROP = 88  # pixels


def noise(*shape: int, device: torch.device = CPU, seed: int = 0) -> Tensor:
    """Makes normal noise, each time and on each device the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@dataclass(frozen=True)
class Utterance:
    """What a clip of noise holds."""

    video: Tensor  # (T, 1, H, W)
    audio: Tensor  # (640 T, 1)
    target: Tensor  # token ids, (U,)


def make_utterances(
    frames: Sequence[int], tokens: Sequence[int], vocabulary: int, crop: int = CROP
) -> list[Utterance]:
    """Makes utterances of T video frames and U tokens each, of ids from 1 to `vocabulary` - 1."""
    generator = torch.Generator().manual_seed(0)
    return [
        Utterance(
            torch.randn(length, 1, crop, crop, generator=generator),
            0.1 * torch.randn(length * SAMPLES_PER_FRAME, 1, generator=generator),
            torch.randint(1, vocabulary, (count,), generator=generator),
        )
        for length, count in zip(frames, tokens, strict=True)
    ]


def make_batch(
    utterances: Sequence[Utterance],
    device: torch.device,
    streams: Sequence[str] = STREAMS,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Pads streams of utterances to a batch, as the data module does.

    Returns:
        What `E2E.forward` takes: streams on the device, and on the host their lengths and targets
        padded with -1.
    """
    clips = {name: [getattr(one, name) for one in utterances] for name in streams}
    targets = [one.target for one in utterances]
    return (
        {name: pad_sequence(x, batch_first=True).to(device) for name, x in clips.items()},
        {name: torch.tensor([len(one) for one in x]) for name, x in clips.items()},
        pad_sequence(targets, batch_first=True, padding_value=IGNORE_ID),
    )
