"""The real frames of a padded batch: what works frame by frame sees them alone."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RealFrames:
    """Where the N real frames of B utterances, padded to T frames each, are.

    Made once for a front-end or encoder: layers then neither compute on padding, nor let it into
    batch statistics, nor ask the device again where it is.

    Attributes:
        batch: B.
        length: T.
        places: Places of the real frames among the B·T, utterance by utterance, (N,); None if
            all are real.
        places_in_time: Number of each real frame in its utterance, (N,).
        lengths: Length of the utterance of each real frame, (N,).
    """

    batch: int
    length: int
    places: Tensor | None
    places_in_time: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lengths: Tensor, length: int) -> "RealFrames":
        """Finds the real frames. It waits for the device: how many there are shapes what follows.

        Args:
            lengths: Real frames of each utterance, (B,).
            length: T.
        """
        lengths = lengths.clamp(max=length)
        number = int(lengths.sum())
        rows = torch.repeat_interleave(lengths, output_size=number)  # (N,)
        starts = lengths.cumsum(0) - lengths
        in_time = torch.arange(number, device=lengths.device) - starts[rows]
        places = None if number == len(lengths) * length else rows * length + in_time
        return cls(len(lengths), length, places, in_time, lengths[rows])

    @cached_property
    def mask(self) -> Tensor | None:
        """Real frames, (B, T), True is one; None if all are real."""
        if self.places is None:
            return None
        mask = self.places.new_zeros(self.batch * self.length, dtype=torch.bool)
        return mask.index_fill_(0, self.places, True).view(self.batch, self.length)

    def pack(self, x: Tensor) -> Tensor:
        """Leaves out the padding, (B, T, ...) -> (N, ...)."""
        frames = x.flatten(0, 1)
        return frames if self.places is None else frames.index_select(0, self.places)

    def pad(self, x: Tensor) -> Tensor:
        """Puts real frames among zeros, (N, ...) -> (B, T, ...)."""
        if self.places is not None:
            padded = x.new_zeros(self.batch * self.length, *x.shape[1:])
            x = padded.index_copy_(0, self.places, x)
        return x.unflatten(0, (self.batch, self.length))

    def neighbour(self, offset: int) -> Tensor:
        """Places among the N of the frames that lie `offset` later, (N,); N where there is none."""
        number = len(self.lengths)
        moved = self.places_in_time + offset
        inside = (moved >= 0) & (moved < self.lengths)
        return (torch.arange(number, device=moved.device) + offset).where(inside, number)

    @cached_property
    def previous(self) -> Tensor:
        """Places of the frames before, as `neighbour` gives them."""
        return self.neighbour(-1)

    @cached_property
    def following(self) -> Tensor:
        """Places of the frames after, as `neighbour` gives them."""
        return self.neighbour(1)

    def extend(self, x: Tensor, before: int, after: int) -> Tensor:
        """Adds to each frame what a convolution needs of its neighbours; zeros at the ends.

        Args:
            x: Steps of the real frames, (N, P, ...).
            before: Steps of the frame before, at most P.
            after: Steps of the frame after, at most P.

        Returns:
            (N, before + P + after, ...).
        """
        parts = [x]
        if before:
            parts.insert(0, take_or_zero(x[:, x.size(1) - before :], self.previous))
        if after:
            parts.append(take_or_zero(x[:, :after], self.following))
        return torch.cat(parts, dim=1)


def take_or_zero(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x, (N, ...), by place; zeros for place N."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, places)


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch normalisation over all axes but the last, that of the channels.

    Args:
        norm: A one-dimensional batch norm over D channels.
        x: Features of real frames, (N, ..., D).

    Returns:
        Features of the same shape.
    """
    return norm(x.flatten(0, -2)).view_as(x)


def convolve(convolution: nn.Conv1d, x: Tensor, padding: int = 0) -> Tensor:
    """Applies a one-dimensional convolution to features whose last axis is the channel.

    As a two-dimensional one over images of height 1 it keeps that order, which is faster on
    CPUs (nearly twice for few channels) and what batch norm over frames wants. A kernel of one
    step is a linear layer; oneDNN crashes on it with a stride and fewer than 16 channels.

    Args:
        convolution: Convolution from D to D' channels, in one group.
        x: Features, (N, P, D).
        padding: Zeros at both ends, instead of the convolution's own padding: real frames are
            extended by their neighbours.

    Returns:
        Features, (N, P', D').
    """
    if convolution.kernel_size == (1,):
        x = x[:, :: convolution.stride[0]]
        return F.linear(x, convolution.weight.squeeze(-1), convolution.bias)
    image = x.transpose(1, 2).unsqueeze(2)  # (N, P, D) -> (N, D, 1, P)
    convolved = F.conv2d(
        image,
        convolution.weight.unsqueeze(2),
        convolution.bias,
        stride=(1, *convolution.stride),
        padding=(0, padding),
    )
    return convolved.squeeze(2).transpose(1, 2)  # (N, D', 1, P') -> (N, P', D')
