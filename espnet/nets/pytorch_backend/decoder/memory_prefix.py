"""The encoder's output as embeddings of a language model, and sequences of different lengths."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet.nets.pytorch_backend.nets_utils import send
from espnet.nets.pytorch_backend.real_frames import RealFrames


class MemoryPrefix(nn.Module):
    """Turns the encoder's output into a shorter sequence of embeddings of the language model.

    Frames are stacked and projected by two layers with a GELU between, as in Llama-AVSR; the
    layer norm at the end begins at the size of the embeddings of tokens.

    Args:
        memory_dim: Size of a frame.
        dim: Size of an embedding D.
        downsample: Frames in an embedding.
        embedding_rms: Root mean square of the embeddings of tokens.
    """

    def __init__(self, *, memory_dim: int, dim: int, downsample: int, embedding_rms: float) -> None:
        super().__init__()
        self.downsample = downsample
        self.projection = nn.Sequential(
            nn.Linear(downsample * memory_dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.constant_(self.norm.weight, embedding_rms)

    def forward(self, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Makes embeddings.

        Args:
            memory: Encoder output, (B, T, memory_dim), padded with anything.
            lengths: Real frames, (B,).

        Returns:
            Embeddings, (B, ceil(T / downsample), D), and how many are real, (B,). The frames that
            the last one of an utterance lacks are zero.
        """
        memory = RealFrames.of(lengths, memory).clear(memory)
        memory = F.pad(memory, (0, 0, 0, -memory.size(1) % self.downsample))
        stacked = memory.unflatten(1, (-1, self.downsample)).flatten(2)  # (B, T, E) -> (B, M, n·E)
        embeddings = self.norm(self.projection(stacked.to(self.norm.weight.dtype)))
        return embeddings, self.lengths(lengths)

    def lengths(self, lengths: Tensor) -> Tensor:
        """Embeddings of so many frames, (B,)."""
        return (lengths + self.downsample - 1) // self.downsample


def join(first: Tensor, lengths: Tensor, second: Tensor) -> Tensor:
    """Appends to each sequence of a padded batch another one, right where it ends.

    All padding comes last then: behind a causal mask it needs no other, and position i of an
    utterance is i in any batch.

    Args:
        first: Sequences, (B, T, D).
        lengths: Their real lengths, (B,).
        second: Sequences, (B, U, D).

    Returns:
        Sequences, (B, T + U, D); after the first `lengths` + U positions there is no sense.
    """
    both = torch.cat([first, second], dim=1)
    if int(lengths.min()) == first.size(1):
        return both
    places = torch.arange(both.size(1))
    skipped = (first.size(1) - lengths).unsqueeze(1)
    index = torch.where(places < lengths.unsqueeze(1), places, places + skipped)
    index = send(index.clamp(max=both.size(1) - 1), both.device)
    return both.gather(1, index.unsqueeze(2).expand_as(both))
