"""Loading of transformers checkpoints, by hub id or from a folder, with one-line errors."""

import hashlib
import inspect
import json
import os
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from espnet.nets.encoders import folder_problem, type_problem
from espnet.nets.pytorch_backend.qlora_utils import (
    check_quantisation,
    finish_loading,
    loading_config,
)

Model = TypeVar("Model", bound=PreTrainedModel)
SHOWN = 3  # missing weights that an error names
SAMPLES = 16  # values of each weight that go into a fingerprint
# Entries of config.json that change when a checkpoint is only saved again.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_commit_hash")


@dataclass(frozen=True)
class Base:
    """The checkpoint that a part of the model was loaded from.

    Attributes:
        name: Hub id or folder.
        fingerprint: Of its config, and of the names, shapes and first values of its weights.
    """

    name: str
    fingerprint: str


def load_pretrained(
    model_class: type[Model],
    name: str,
    model_types: tuple[str, ...],
    *,
    flag: str,
    key_mapping: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: bool = False,
    **options: Any,
) -> Model:
    """Loads the weights of a checkpoint, and makes sure that none is missing.

    The model's attribute `base` then says what it was loaded from, and `load_plain` loads it once
    more, in full precision, whatever has become of the model by then.

    Args:
        model_class: Class of transformers, or one of its Auto classes.
        name: Hub id, or a folder as `save_pretrained` leaves it.
        model_types: Architectures, as config.json names them, that it may be of.
        flag: Command-line option that names it, for errors.
        key_mapping: Regular expressions for names of weights, and what takes their place.
        dtype: Precision of the weights.
        quantize: Whether its linear layers go into 4 bits, one by one while they are loaded.
        **options: What else the constructor of the class is to be told.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such checkpoint, it cannot be fetched, it is of another
            architecture, or it lacks weights.
    """
    load_plain = partial(
        load_pretrained,
        *(model_class, name, model_types),
        flag=flag,
        key_mapping=key_mapping,
        **options,
    )
    if problem := folder_problem(flag, name, model_types):
        raise ValueError(problem)
    if quantize:
        check_quantisation(quantizing_device())
    remedy = f"give {flag} the folder or hub id of a {model_types[0]} checkpoint"
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # It lists the weights of the parts left out.
    try:
        found = AutoConfig.from_pretrained(name).model_type
        if found in model_types:
            if quantize:
                # Classes that choose another by the config have no constructor of their own.
                build = getattr(model_class, "from_config", model_class)
                config_class = getattr(model_class, "config_class", AutoConfig)
                with torch.device("meta"):
                    empty = build(config_class.from_pretrained(name))
                options["quantization_config"] = loading_config(empty)
            model, report = model_class.from_pretrained(
                name,
                dtype=torch.float32 if quantize else dtype,
                device_map={"": quantizing_device()} if quantize else None,
                key_mapping=key_mapping,
                output_loading_info=True,
                **options,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise  # The checkpoint is not to blame.
    except Exception as error:  # Readers of damaged files raise what they like.
        raise ValueError(f"{flag} {name} {loading_problem(error)}: {remedy}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if found not in model_types:
        raise ValueError(f"{flag} {name} {type_problem(found, model_types)}: {remedy}")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{flag} {name} lacks {len(missing)} weights of {type(model).__name__}, such as "
            f"{', '.join(missing[:SHOWN])}: {remedy}"
        )
    if quantize:
        finish_loading(model, dtype)
    model.base = Base(name, _fingerprint(name, model))
    model.load_plain = load_plain
    return model


def quantizing_device() -> torch.device:
    """Where weights are quantised: the GPU of this process if there is one, which is far faster.

    Only one weight at a time is there in full precision.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device("cuda", int(local_rank) % torch.cuda.device_count())


def bases(model: nn.Module) -> dict[str, Base]:
    """What the parts of a model were loaded from.

    Args:
        model: Recogniser.

    Returns:
        A checkpoint for each part, by the part's name in the model.
    """
    return {
        name: module.base
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base", None), Base)
    }


def from_bases(model: nn.Module) -> set[str]:
    """Names of a model's weights that loading its bases brings back: those that stay as they are.

    Args:
        model: Recogniser.

    Returns:
        Names in its state dict; the tables of quantised weights are among them.
    """
    prefixes = tuple(f"{name}." for name in bases(model))
    kept = {name for name, _ in model.named_buffers()}
    kept |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name for name in model.state_dict() if name.startswith(prefixes)} - kept


def _fingerprint(name: str, model: PreTrainedModel) -> str:
    """Tells checkpoints apart, in whatever precision and whether in 4 bits they were loaded."""
    config, _ = PretrainedConfig.get_config_dict(name)
    text = json.dumps(_lasting(config), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    linear = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    # An output layer that shares its weight with them is never in 4 bits.
    linear -= {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for key, weight in sorted(model.named_parameters()):
        state = getattr(weight, "quant_state", None)
        digest.update(f"{key} {tuple(weight.shape if state is None else state.shape)}".encode())
        if id(weight) not in linear:  # what may be in 4 bits has no values to compare
            digest.update(_first_values(weight))
    return digest.hexdigest()[:16]


def _lasting(config: Any) -> Any:
    """A config, and those in it, without the entries that change when it is saved again."""
    if not isinstance(config, dict):
        return config
    return {key: _lasting(value) for key, value in config.items() if key not in VOLATILE}


def _first_values(weight: Tensor) -> bytes:
    values = weight.detach().flatten()[:SAMPLES].to("cpu", torch.bfloat16)
    return values.view(torch.int16).numpy().tobytes()


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Makes layers in training mode compute their activations again in the backward pass.

    Args:
        model: Model of transformers.
    """
    # transformers renamed it in the course of version 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


@cache
def cache_argument(layer: type[nn.Module]) -> str:
    """Name under which a layer of transformers takes the cache of keys and values.

    Args:
        layer: Class of a decoder layer, or of an attention.
    """
    # transformers renamed it in the course of version 5.
    renamed = "cache" in inspect.signature(layer.forward).parameters
    return "cache" if renamed else "past_key_values"


def loading_problem(error: Exception) -> str:
    """Why transformers could not load a checkpoint, as the rest of a sentence that names it."""
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return "on the Hugging Face hub asks for a licence and a login (hf auth login)"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "is neither a folder here nor a checkpoint on the Hugging Face hub"
    if "ignore_mismatched_sizes" in str(error):
        return "has weights that do not fit its config.json"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "connect" in text or "offline" in text:
        return (
            "is neither a folder here nor in the cache, and the Hugging Face hub cannot be reached"
        )
    return f"cannot be loaded ({text[:200]})"
