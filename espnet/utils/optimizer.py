"""The optimiser: AdamW, with rates and weight decay for each kind of parameter."""

from typing import Any

import torch
from torch import nn

from espnet.nets.pytorch_backend.pretrained import bases
from espnet.nets.pytorch_backend.qlora_utils import load_package

BETAS = (0.9, 0.98)


def parameter_groups(
    model: nn.Module, *, lr: float, lr_pretrained: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """Sorts the trainable parameters by rate and weight decay, those of `lr` first.

    Adapters and parts that come from a checkpoint have `lr_pretrained`; None: `lr`. Only the
    matrices of layers (linear, convolution, embedding, adapter) have weight decay: not norms,
    biases, gates, nor vectors such as that of a missing stream.

    Returns:
        Groups for an optimiser; none is empty.
    """
    prefixes = tuple(f"{name}." for name in bases(model))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            adapted = name.startswith(prefixes) or ".lora_" in name
            decays = (
                name.endswith(".weight") and parameter.ndim > 1
            )  # Those of norms have one axis.
            groups.setdefault((adapted, not decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr if lr_pretrained is None or not adapted else lr_pretrained,
            "weight_decay": 0.0 if without_decay else weight_decay,
        }
        for (adapted, without_decay), parameters in sorted(groups.items(), key=lambda i: i[0])
    ]


def build_optimizer(
    name: str, groups: list[dict[str, Any]], *, fused: bool
) -> torch.optim.Optimizer:
    """Builds `adamw`, which may make its step in one kernel (`fused`), or `adamw8bit`.

    The moments of the latter take a quarter of the memory. Source: Dettmers et al., 8-bit
    Optimizers via Block-wise Quantization, ICLR 2022.

    Raises:
        ValueError: If the name is unknown, or bitsandbytes cannot be imported.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, fused=fused or None)
    elif name == "adamw8bit":
        return load_package("bitsandbytes").optim.AdamW8bit(groups, betas=BETAS)
    raise ValueError(f"optimizer {name!r} is unknown: choose adamw or adamw8bit")
