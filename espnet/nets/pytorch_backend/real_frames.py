"""The real frames of a padded batch: what works frame by frame sees them alone."""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.nets_utils import length_groups, send

MAX_PADDING = 0.3  # largest share of an utterance in a block that is padding


class RealFrames:
    """Where the N real frames of B utterances, padded to T frames each, are.

    Made once for a front-end, encoder or decoder, from lengths on the host: layers then neither
    compute on padding, nor let it into batch statistics, and nobody waits for the device to learn
    how many there are. Packed, the frames lie one utterance after the other.

    Args:
        lengths: Frames of each utterance, (B,), on the host; they count up to T.
        length: T.
        device: Where the frames are.

    Attributes:
        lengths: Real frames of each utterance, (B,), on the host.
        length: T.
        ragged: Whether any frame is padding.
    """

    def __init__(self, lengths: Tensor, length: int, device: torch.device) -> None:
        self.lengths = lengths.clamp(max=length)
        self.length = length
        self.device = device
        self.ragged = bool((lengths < length).any())

    @classmethod
    def of(cls, lengths: Tensor, x: Tensor) -> "RealFrames":
        """Of a padded batch, (B, T, ...)."""
        return cls(lengths, x.size(1), x.device)

    @cached_property
    def mask(self) -> Tensor | None:
        """Real frames, (B, T), True is one; None if all are: attention is faster without."""
        if not self.ragged:
            return None
        lengths = send(self.lengths, self.device)
        return torch.arange(self.length, device=self.device) < lengths.unsqueeze(1)

    @cached_property
    def blocks(self) -> "list[RealFrames]":
        """Utterances of similar length, of a batch whose longest come first.

        Attention takes frames padded: its work grows with the square of the length, but many small
        blocks would be slow too.
        """
        lengths = self.lengths.tolist()
        return [
            RealFrames(self.lengths[rows[0] : rows[-1] + 1], lengths[rows[0]], self.device)
            for rows in length_groups(lengths, max_padding=MAX_PADDING)
        ]

    @property
    def number(self) -> int:
        """N."""
        return int(self.lengths.sum())

    def pack(self, x: Tensor) -> Tensor:
        """Leaves out the padding, (B, T, ...) -> (N, ...)."""
        frames = x.flatten(0, 1)
        return frames.index_select(0, self._places) if self.ragged else frames

    def pad(self, x: Tensor) -> Tensor:
        """Puts real frames among zeros, (N, ...) -> (B, T, ...)."""
        shape = (len(self.lengths), self.length)
        if self.ragged:
            padded = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
            x = padded.index_copy_(0, self._places, x)
        return x.unflatten(0, shape)

    def clear(self, x: Tensor) -> Tensor:
        """Sets the padding of features, (B, T, D), to zero."""
        return x if self.mask is None else x * self.mask.unsqueeze(-1)

    def first(self, lengths: Tensor) -> Tensor:
        """Places among the N of the first frames of each utterance, `lengths` (B,) of them."""
        row, time = self._coordinates
        return send((time < lengths[row]).nonzero().squeeze(1), self.device)

    def neighbour(self, offset: int) -> Tensor:
        """Places among the N of the frames that lie `offset` later, (N,); N where there is none."""
        row, time = self._coordinates
        moved, number = time + offset, len(time)
        inside = (moved >= 0) & (moved < self.lengths[row])
        return send((torch.arange(number) + offset).where(inside, number), self.device)

    @cached_property
    def previous(self) -> Tensor:
        """Places of the frames before, as `neighbour` gives them."""
        return self.neighbour(-1)

    @cached_property
    def following(self) -> Tensor:
        """Places of the frames after, as `neighbour` gives them."""
        return self.neighbour(1)

    @cached_property
    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """Utterance of each real frame, and its number there, (N,) each, on the host."""
        real = torch.arange(self.length) < self.lengths.unsqueeze(1)
        return real.nonzero(as_tuple=True)

    @cached_property
    def _places(self) -> Tensor:
        """Places of the real frames among the B·T, (N,): faster to index by than a mask."""
        row, time = self._coordinates
        return send(row * self.length + time, self.device)

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
