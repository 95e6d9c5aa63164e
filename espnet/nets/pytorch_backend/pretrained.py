"""Loading of transformers checkpoints, by hub id or from a folder, with one-line errors."""

from typing import TypeVar

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from espnet.nets.encoders import folder_problem

Model = TypeVar("Model", bound=PreTrainedModel)
SHOWN = 3  # missing weights that an error names


def load_pretrained(
    model_class: type[Model],
    name: str,
    model_types: tuple[str, ...],
    *,
    flag: str,
    key_mapping: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Model:
    """Loads the weights of a checkpoint, and makes sure that none is missing.

    Args:
        model_class: Class of transformers.
        name: Hub id, or a folder as `save_pretrained` leaves it.
        model_types: Architectures, as config.json names them, that it may be of.
        flag: Command-line option that names it, for errors.
        key_mapping: Regular expressions for names of weights, and what takes their place.
        dtype: Precision of the weights.
        **options: What else the constructor of the class is to be told.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such checkpoint, it cannot be fetched, it is of another
            architecture, or it lacks weights.
    """
    if problem := folder_problem(flag, name, model_types):
        raise ValueError(problem)
    remedy = f"give {flag} the folder or hub id of a {model_types[0]} checkpoint"
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # It lists the weights of the parts left out.
    try:
        found = AutoConfig.from_pretrained(name).model_type
        if found in model_types:
            model, report = model_class.from_pretrained(
                name,
                dtype=dtype,
                key_mapping=key_mapping,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # Readers of damaged files raise what they like.
        raise ValueError(f"{flag} {name} {loading_problem(error)}: {remedy}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if found not in model_types:
        raise ValueError(
            f"{flag} {name} is a checkpoint of {found}, one of {' or '.join(model_types)} is "
            f"expected: {remedy}"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{flag} {name} lacks {len(missing)} weights of {model_class.__name__}, such as "
            f"{', '.join(missing[:SHOWN])}: {remedy}"
        )
    return model


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Makes layers in training mode compute their activations again in the backward pass.

    Args:
        model: Model of transformers.
    """
    # transformers renamed it in the course of version 5.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


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
