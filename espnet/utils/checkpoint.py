"""Reading, loading and averaging of checkpoints, without ever unpickling code."""

import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espnet.errors import first_line
from espnet.nets.pytorch_backend.e2e_asr_conformer import rename_single_frontend
from espnet.nets.pytorch_backend.pretrained import bases, from_bases
from espnet.nets.pytorch_backend.qlora_utils import adapter_names, plain_shapes, to_adapted_names

BARE_FRONTEND = ("trunk.", "frontend3D.")  # names in word-classification checkpoints
FRONTENDS = ("video_frontend", "audio_frontend")
BETWEEN = ("missing_video", "missing_audio", "proj_encoder")  # front-ends and encoder
VOCABULARY_LAYERS = ("decoder.embed.", "decoder.output_layer.", "ctc.ctc_lo.")
PART_WIDTH = 14  # of the longest name
SHOWN = 3  # mismatches that an error names
VOCABULARY = "vocabulary"  # under which a checkpoint keeps the fingerprint of its tokens


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that holds nothing but tensors and plain values.

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
        raise ValueError(
            f"checkpoint {path} cannot be read ({first_line(error)}): it is damaged or no PyTorch "
            "checkpoint"
        ) from None
    if not isinstance(content, Mapping):
        raise ValueError(
            f"checkpoint {path} holds a {type(content).__name__}, a state dict is expected"
        )
    of_model = getattr(content, "_metadata", {}).get("", {})
    known = {VOCABULARY: of_model[VOCABULARY]} if VOCABULARY in of_model else {}
    return {**content, **known}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads model weights by the names that the model here gives them.

    The file is a `.pth` state dict, a Lightning `.ckpt`, or a dict with `model_state_dict`.

    Raises:
        ValueError: As `read_checkpoint`, or if there are no weights.
    """
    return _state_dict(read_checkpoint(path), path)


def _state_dict(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
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


def trained_content(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of a model: its weights but those that its bases bring back.

    Returns:
        A plain state dict; for a model with pretrained parts `model_state_dict`, the weights, and
        `bases`, the name and fingerprint of what each part was loaded from. The fingerprint of the
        vocabulary is beside them as `vocabulary`, or in the plain state dict's `_metadata`, where
        PyTorch keeps what it knows of modules.
    """
    state, found = without_bases(model, model.state_dict())
    return _content(state, found, model.vocabulary)


def _content(
    state: Mapping[str, Tensor], found: Mapping[str, Any], vocabulary: str | None
) -> dict[str, Any]:
    if found:
        known = {VOCABULARY: vocabulary} if vocabulary else {}
        return {"model_state_dict": state, "bases": found, **known}
    state = OrderedDict(state)
    if vocabulary:  # The model's own `_metadata` is left out, as it has always been.
        state._metadata = {"": {VOCABULARY: vocabulary}}
    return state


def without_bases(
    model: nn.Module, state: Mapping[str, Tensor], prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leaves out of a state dict what loading the model's bases brings back.

    Its names are the model's own, with `prefix` before them.

    Returns:
        The other weights, and name and fingerprint of each base.
    """
    left_out = {f"{prefix}{name}" for name in from_bases(model)}
    kept = {name: value for name, value in state.items() if name not in left_out}
    return kept, {part: vars(base) for part, base in bases(model).items()}


def load_model(model: nn.Module, path: str | Path, content: dict[str, Any] | None = None) -> None:
    """Loads a checkpoint of the whole model; `content` is what it holds, if it has been read.

    Raises:
        ValueError: If the checkpoint cannot be read, does not fit, or belongs to other bases or
            another vocabulary.
    """
    content = read_checkpoint(path) if content is None else content
    check_bases(model, content, path)
    check_vocabulary(model, content, path)
    load_weights(model, _state_dict(content, path), path)


def check_bases(model: nn.Module, content: Mapping[str, Any], source: str | Path) -> None:
    """Makes sure that a checkpoint was trained on what the model's parts were loaded from.

    One that holds all weights itself names no bases. Errors call the checkpoint `source`.

    Raises:
        ValueError: If a part was loaded from something else.
    """
    recorded = content.get("bases", {})
    for part, base in bases(model).items():
        trained = recorded.get(part)
        if trained is not None and trained["fingerprint"] != base.fingerprint:
            raise ValueError(
                f"checkpoint {source} was trained on {trained['name']} (fingerprint "
                f"{trained['fingerprint']}) as {part}, but the model has {base.name} (fingerprint "
                f"{base.fingerprint}): give the one that it was trained on"
            )


def check_vocabulary(model: nn.Module, content: Mapping[str, Any], source: str | Path) -> None:
    """Makes sure that a checkpoint's ids stand for the model's tokens.

    Earlier checkpoints do not tell. Errors call the checkpoint `source`.

    Raises:
        ValueError: If they stand for others.
    """
    trained = content.get(VOCABULARY)
    if None not in (trained, model.vocabulary) and trained != model.vocabulary:
        raise ValueError(
            f"checkpoint {source} was trained with another vocabulary (fingerprint {trained}) than "
            f"the one given (fingerprint {model.vocabulary}): give its own, of which its run keeps "
            "a copy, with --sp-model-path (or --decoder-name), or train on with --transfer-all"
        )


def load_weights(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str | Path,
    *,
    optional: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Loads weights, which must fit the module exactly; errors call their origin `source`.

    Those that the module's bases bring back may be absent, and so may those named `optional`.

    Raises:
        ValueError: If names or shapes differ; the first few are named.
    """
    own = module.state_dict()
    # The text among the tables of a weight in 4 bits is as long as its numbers happen to be.
    shapes = {n: value.shape for n, value in own.items() if ".weight.quant_state." not in n}
    # Weights in 4 bits take plain ones too, which are quantised then.
    plain = {name: s for name, s in plain_shapes(module).items() if name in state}
    shapes |= {name: s for name, s in plain.items() if state[name].is_floating_point()}
    left_out = {*optional, *from_bases(module)}
    left_out |= {name for name in own if name.startswith(tuple(f"{name}." for name in plain))}
    problems = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    problems += [f"{name} is missing" for name in own if name not in state and name not in left_out]
    problems += [f"{name} is unknown" for name in state if name not in own]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"checkpoint {source} does not fit the model: {'; '.join(problems[:SHOWN])}{more}: "
            "give the model options and the vocabulary that it was trained with"
        )
    module.load_state_dict(state, strict=False)  # What may be absent is known by now.


def transfer_weights(
    model: nn.Module,
    path: str | Path,
    *,
    frontend: bool = False,
    encoder: bool = False,
    everything: bool = False,
) -> str:
    """Starts a model from a checkpoint, or only from parts of it.

    Args:
        model: To start.
        path: Checkpoint.
        frontend: Whether to take its front-ends, those that the model has.
        encoder: Whether to take its encoder and, where it fits, the projection before it.
        everything: Whether to take all that both have but the layers of the vocabulary; the
            projection and what stands for a missing stream again where they fit.

    Returns:
        A table: of how many entries of each part of the model the weights were taken.

    Raises:
        ValueError: If the checkpoint cannot be read, does not fit, or lacks the part.
    """
    content = read_checkpoint(path)
    state = to_adapted_names(model, _state_dict(content, path))
    recorded = content.get("bases", {})
    optional = adapter_names(model) | _brought_back(model, recorded)
    if not (frontend or encoder or everything):
        check_bases(model, content, path)
        check_vocabulary(model, content, path)
        load_weights(model, state, path, optional=optional)
        return _table(model, state, set(state), path)
    parts = [*FRONTENDS] * (frontend or everything) + ["encoder"] * (encoder or everything)
    parts += ["decoder", "ctc"] * everything
    left_out = {name for name in model.state_dict() if name.startswith(VOCABULARY_LAYERS)}
    taken = _take_fitting(model, state, BETWEEN if encoder or everything else ())
    loaded = []
    for part in parts:
        prefix = f"{part}."
        names = {n for n in state if n.startswith(prefix) and not n.startswith(VOCABULARY_LAYERS)}
        module = getattr(model, part, None)
        if names and module is not None:
            of_part = {name: base for name, base in recorded.items() if name.startswith(prefix)}
            check_bases(model, {"bases": of_part}, path)
            weights = {name.removeprefix(prefix): state[name] for name in names}
            absent = {n.removeprefix(prefix) for n in optional | left_out if n.startswith(prefix)}
            load_weights(module, weights, path, optional=absent)
            loaded.append(part)
            taken |= names
    lacking = (frontend and not set(loaded) & set(FRONTENDS)) or (
        encoder and "encoder" not in loaded
    )
    if lacking or not loaded:
        raise ValueError(
            f"checkpoint {path} has no weights for {' or '.join(parts)} of this model: it begins "
            f"with {', '.join(list(state)[:SHOWN])}"
        )
    return _table(model, state, taken, path)


def _take_fitting(
    model: nn.Module, state: Mapping[str, Tensor], parts: tuple[str, ...]
) -> set[str]:
    """Loads those parts that a checkpoint has in the same shape; returns the names of weights."""
    own = model.state_dict()
    taken = set()
    for part in parts:
        names = _names_of(part, own)
        if all(name in state and state[name].shape == own[name].shape for name in names):
            for name in names:
                own[name].copy_(state[name])
            taken |= names
    return taken


def _names_of(part: str, names: Iterable[str]) -> set[str]:
    """The names of a part's weights; a part may be a weight itself."""
    return {name for name in names if name == part or name.startswith(f"{part}.")}


def _table(model: nn.Module, state: Mapping[str, Tensor], taken: set[str], path: str | Path) -> str:
    """Says of how many entries of each part the weights were taken.

    What the parts' own checkpoints bring back, and tables of weights in 4 bits, do not count.
    """
    inside = tuple(f"{name}." for name in plain_shapes(model))
    brought = from_bases(model).difference(state)
    own = [n for n in model.state_dict() if n not in brought and not n.startswith(inside)]
    lines = [f"Weights from {path}:"]
    for part in dict.fromkeys(name.split(".")[0] for name in own):
        names = _names_of(part, own)
        lines.append(f"  {part:<{PART_WIDTH}} {len(names & taken):>5} of {len(names)} entries")
    return "\n".join(lines)


def _brought_back(model: nn.Module, recorded: Mapping[str, Any]) -> set[str]:
    """Names of weights that a checkpoint may lack: its bases have them, trained here or not."""
    prefixes = tuple(f"{part}." for part in recorded)
    return {name for name in model.state_dict() if name.startswith(prefixes)}


def average_checkpoints(paths: list[Path]) -> dict[str, Any]:
    """Averages the weights of epochs of a run, the oldest first; counters are those of the last.

    Returns:
        What `trained_content` would give for a model with these weights.

    Raises:
        ValueError: If a checkpoint cannot be read.
    """
    content = read_checkpoint(paths[-1])
    state = _state_dict(content, paths[-1])
    total = {name: value.double() for name, value in state.items() if value.is_floating_point()}
    for path in paths[:-1]:
        other = read_state_dict(path)
        for name in total:
            total[name] += other[name]
    for name, value in total.items():
        state[name] = (value / len(paths)).to(state[name].dtype)
    return _content(state, content.get("bases", {}), content.get(VOCABULARY))
