"""Reading, loading and averaging of checkpoints, without ever unpickling code."""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espnet.nets.pytorch_backend.e2e_asr_conformer import rename_single_frontend

BARE_FRONTEND = ("trunk.", "frontend3D.")  # names in word-classification checkpoints
SHOWN = 3  # mismatches that an error names

logger = logging.getLogger(__name__)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that holds nothing but tensors and plain values.

    Args:
        path: File to read.

    Returns:
        Its content.

    Raises:
        ValueError: If the file is missing, is no checkpoint, or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path} does not exist: check the path") from None
    except pickle.UnpicklingError as error:
        cause = str(error).split("Please file")[0].splitlines()
        detail = next((line for line in cause if "GLOBAL" in line or "global" in line), cause[0])
        raise ValueError(
            f"checkpoint {path} is not loaded, since it holds more than tensors and plain values "
            f"({detail.strip()[:150]}): save its state dict alone"
        ) from None
    except Exception as error:  # Whatever a damaged file makes the reader stumble over.
        cause = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise ValueError(
            f"checkpoint {path} cannot be read ({cause}): it is damaged or no PyTorch checkpoint"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"checkpoint {path} holds a {type(content).__name__}, a state dict is expected"
        )
    return dict(content)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads model weights: a plain state dict, or the one inside a training checkpoint.

    Args:
        path: A `.pth` state dict, a Lightning `.ckpt`, or a dict with `model_state_dict`.

    Returns:
        Weights by the names that the model here gives them.

    Raises:
        ValueError: As `read_checkpoint`, or if there are no weights.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content.get("model_state_dict", content))
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"checkpoint {path} holds no weights by name: a state dict is expected")
    if "state_dict" in content:
        state = {
            name.removeprefix("model."): value
            for name, value in state.items()
            if name.startswith("model.")
        }
    state = {
        f"frontend.{name}" if name.startswith(BARE_FRONTEND) else name: value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise ValueError(f"checkpoint {path} holds no weights: a state dict is expected")
    rename_single_frontend(state)
    return state


def load_weights(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Loads weights that must fit the module exactly.

    Args:
        module: Module to fill.
        state: Weights by name.
        source: What the error calls their origin.

    Raises:
        ValueError: If names or shapes differ; the first few are named.
    """
    own = module.state_dict()
    problems = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems += [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in own]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"checkpoint {source} does not fit the model: {'; '.join(problems[:SHOWN])}{more}: "
            "give the model options and the vocabulary that it was trained with"
        )
    module.load_state_dict(state)


def transfer_weights(
    model: nn.Module, path: str | Path, *, frontend: bool = False, encoder: bool = False
) -> None:
    """Starts a model from a checkpoint, or only a part of it.

    Args:
        model: Recogniser to fill.
        path: Checkpoint.
        frontend: Take only the weights of the front-ends that the checkpoint has.
        encoder: Take only the weights of the encoder.

    Raises:
        ValueError: If the checkpoint cannot be read, does not fit, or lacks the part.
    """
    state = read_state_dict(path)
    if not frontend and not encoder:
        load_weights(model, state, path)
        return
    parts = ["video_frontend", "audio_frontend"] * frontend + ["encoder"] * encoder
    loaded = []
    for part in parts:
        prefix = f"{part}."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        module = getattr(model, part, None)
        if weights and module is not None:
            load_weights(module, weights, path)
            loaded.append(part)
    if (frontend and loaded in ([], ["encoder"])) or (encoder and "encoder" not in loaded):
        raise ValueError(
            f"checkpoint {path} has no weights for {' or '.join(parts)} of this model: it begins "
            f"with {', '.join(list(state)[:SHOWN])}"
        )
    logger.info("Loaded %s from %s", ", ".join(loaded), path)


def average_checkpoints(paths: list[Path]) -> dict[str, Tensor]:
    """Averages the weights of several epochs; counters are those of the last.

    Args:
        paths: Checkpoints of one run, oldest first, at least one.

    Returns:
        State dict of the model.

    Raises:
        ValueError: If a checkpoint cannot be read.
    """
    state = read_state_dict(paths[-1])
    total = {name: value.double() for name, value in state.items() if value.is_floating_point()}
    for path in paths[:-1]:
        other = read_state_dict(path)
        for name in total:
            total[name] += other[name]
    for name, value in total.items():
        state[name] = (value / len(paths)).to(state[name].dtype)
    return state
