"""What the device can do, copies to it, frozen parts, and groups of similar length."""

from functools import cache

import torch
from torch import Tensor, nn


@cache
def has_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16 itself, and does not only emulate it."""
    supported = torch.cuda.is_bf16_supported
    return torch.cuda.is_available() and supported(including_emulation=False)


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the host to a device, and does not wait until it is there."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        x = x.pin_memory()  # From other memory, CUDA may wait all the same.
    return x.to(device, non_blocking=True)


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
