"""Padding masks, work on real frames only, frozen parts, and token accuracy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def padding_mask(lengths: Tensor, max_length: int) -> Tensor | None:
    """Marks the real positions of padded sequences; None for a batch without padding.

    Modules skip their masking for None, so a batch of equal lengths costs nothing extra. The
    test waits for the device, so it is made once for a front-end, encoder or decoder.

    Args:
        lengths: Number of real positions of each sequence, (B,).
        max_length: Padded length T.

    Returns:
        Boolean mask, (B, T), True is a real position; or None when all positions are real.
    """
    if bool((lengths >= max_length).all()):
        return None
    return torch.arange(max_length, device=lengths.device) < lengths.unsqueeze(1)


def batch_norm_real_frames(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Batch normalisation whose statistics leave the padding out.

    Args:
        norm: A one-dimensional batch norm over D channels.
        x: Features, (B, T, D).
        mask: Real frames, (B, T), or None if all are real.

    Returns:
        Normalised features, (B, T, D); in training, padding is zero.
    """
    frames = x.flatten(0, 1)  # (B, T, D) -> (B·T, D)
    if mask is None or not norm.training:
        return norm(frames).view(x.shape)
    real = mask.flatten().nonzero().squeeze(1)  # Indexing by number is faster than by mask.
    normalised = norm(frames.index_select(0, real))
    return normalised.new_zeros(frames.shape).index_copy(0, real, normalised).view(x.shape)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sets padding to zero, so that a convolution sees at an utterance's end what it sees alone.

    Args:
        x: Features, (B, T, D).
        mask: Real frames, (B, T), or None if all are real.

    Returns:
        Features, (B, T, D).
    """
    return x if mask is None else x * mask.unsqueeze(-1)


def convolve(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """Applies a one-dimensional convolution to features whose last axis is the channel.

    As a two-dimensional one over an image of height 1 it keeps that order, which is faster on
    CPUs (nearly twice for few channels) and what batch norm over frames wants. A kernel of one
    step is a linear layer; oneDNN crashes on it with a stride and fewer than 16 channels.

    Args:
        convolution: Convolution from D to D' channels, in one group.
        x: Features, (B, T, D).

    Returns:
        Features, (B, T', D').
    """
    if convolution.kernel_size == (1,):
        x = x[:, :: convolution.stride[0]]
        return F.linear(x, convolution.weight.squeeze(-1), convolution.bias)
    image = x.transpose(1, 2).unsqueeze(2)  # (B, T, D) -> (B, D, 1, T)
    convolved = F.conv2d(
        image,
        convolution.weight.unsqueeze(2),
        convolution.bias,
        stride=(1, *convolution.stride),
        padding=(0, *convolution.padding),
    )
    return convolved.squeeze(2).transpose(1, 2)  # (B, D', 1, T') -> (B, T', D')


def token_accuracy(logits: Tensor, targets: Tensor, ignore_id: int) -> Tensor:
    """Share of the target tokens that get the highest score.

    Args:
        logits: Scores, (B, U, V).
        targets: Token ids, (B, U), padded with `ignore_id`.
        ignore_id: Id of padding.

    Returns:
        Scalar in [0, 1].
    """
    real = targets != ignore_id
    correct = (logits.argmax(dim=-1) == targets) & real
    return correct.sum() / real.sum().clamp(min=1)


def keep_frozen_in_eval(module: nn.Module) -> None:
    """Puts the parts of a module whose parameters are all frozen in eval mode.

    Their dropout and batch statistics would otherwise change what they give, or what they are.

    Args:
        module: Module in training mode.
    """
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            child.eval()
        else:
            keep_frozen_in_eval(child)


class FreezableModule(nn.Module):
    """A module whose frozen parts stay in eval mode, whatever mode it is set to."""

    def train(self, mode: bool = True) -> "FreezableModule":
        """Sets training mode, except for what is frozen.

        Args:
            mode: Whether to train.

        Returns:
            This module.
        """
        super().train(mode)
        keep_frozen_in_eval(self)
        return self


def length_groups(lengths: list[int], *, max_padding: float = 0.1) -> list[list[int]]:
    """Parts a batch into utterances of similar length, so that little work goes into padding.

    Args:
        lengths: Lengths of the utterances.
        max_padding: Largest share of a padded utterance that is padding.

    Returns:
        Rows of each group, longest first.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or lengths[row] < (1 - max_padding) * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups
