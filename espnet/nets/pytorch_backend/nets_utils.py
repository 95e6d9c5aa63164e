"""Padding masks, frozen parts, and groups of similar length."""

import torch
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


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Sets padding to zero, so that a convolution sees at an utterance's end what it sees alone.

    Args:
        x: Features, (B, T, D).
        mask: Real frames, (B, T), or None if all are real.

    Returns:
        Features, (B, T, D).
    """
    return x if mask is None else x * mask.unsqueeze(-1)


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
