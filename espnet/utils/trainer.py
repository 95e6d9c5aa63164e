"""The Lightning trainer of a command line, and the versions that a run is made with."""

import logging
import platform
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers.utils import logging as transformers_logging

from espnet.errors import first_line
from espnet.nets.adaptation import INSTALLED, REQUIREMENTS
from espnet.nets.pytorch_backend.nets_utils import has_bfloat16
from espnet.nets.pytorch_backend.qlora_utils import parameter_report
from espnet.nets.pytorch_backend.sync_batch_norm import synchronise_batch_norm
from espnet.utils.options import HardwareOptions

PACKAGES = (
    "torch",
    "pytorch-lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "numpy",
    "sentencepiece",
    "av",
)


def hardware_arguments(options: HardwareOptions) -> dict[str, Any]:
    """The hardware that a command line asks for, as keyword arguments of Lightning's trainer.

    Raises:
        ValueError: If a GPU is asked for and there is none, or fewer than asked for.
    """
    gpus = torch.cuda.device_count()
    on_gpu = options.accelerator in ("gpu", "cuda") or (options.accelerator == "auto" and gpus > 0)
    if on_gpu and gpus == 0:
        raise ValueError(
            f"--accelerator {options.accelerator}, but PyTorch sees no GPU: use --accelerator cpu"
        )
    if on_gpu and options.gpus and options.gpus > gpus:
        raise ValueError(f"--gpus {options.gpus}, but this machine has {gpus}: use --gpus {gpus}")
    precision = options.precision
    if precision is None:
        precision = "bf16-mixed" if on_gpu and has_bfloat16() else "32-true"
    return {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": options.gpus or (gpus if on_gpu else 1),
        "num_nodes": options.num_nodes,
        "strategy": options.strategy,
        "precision": precision,
        "use_distributed_sampler": False,  # The data module shares out the utterances.
    }


def build_trainer(options: HardwareOptions, model: nn.Module, **others: Any) -> pl.Trainer:
    """Builds the trainer of a model, with `others` as its further arguments.

    Batch norms of the model are synchronised if there are several processes.

    Raises:
        ValueError: If Lightning refuses the options.
    """
    hardware = hardware_arguments(options)
    several = hardware["devices"] * hardware["num_nodes"] > 1
    on_gpu = hardware["accelerator"] == "gpu"
    if several and not on_gpu:
        synchronise_batch_norm(model)
    try:
        return pl.Trainer(
            **hardware,
            sync_batchnorm=several and on_gpu,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
            **others,
        )
    except MisconfigurationException as error:
        raise ValueError(f"Lightning refuses the options: {first_line(error)}") from None


def build_logger(name: str, run_dir: Path, group: str | None) -> Logger | bool:
    """Builds what draws curves beside metrics.csv; False for `csv` and `none`.

    Runs in Weights & Biases can have a group.

    Raises:
        ValueError: If wandb is not installed.
    """
    if name == "tensorboard":
        return TensorBoardLogger(run_dir, name="tensorboard", version="")
    if name == "wandb":
        if find_spec("wandb") is None:
            raise ValueError("--logger wandb, but wandb is not installed: pip install wandb")
        return WandbLogger(name=run_dir.name, project="auto_avsr", group=group, save_dir=run_dir)
    return False


def parameter_count(model: nn.Module) -> str:
    """How many parameters are trained, and of how many, in words."""
    report = parameter_report(model)
    of_all = "" if report.trainable == report.total else f" of {report.total / 1e6:.2f}"
    return f"{report.trainable / 1e6:.2f}{of_all} M parameters"


def package_versions() -> dict[str, str]:
    """Versions of what computes: Python and the packages, and the GPU if there is one."""
    versions = {"python": platform.python_version()}
    missing = REQUIREMENTS.keys() - INSTALLED  # which only adapters need
    versions |= {name: version(name) for name in PACKAGES if name not in missing}
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    return versions


def set_up_logging(*, debug: bool) -> None:
    """Sets the level of the log and silences Lightning's advertisements, if not to debug."""
    transformers_logging.disable_progress_bar()
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, format="%(levelname)s %(message)s"
    )
    if debug:
        return
    for name in ("pytorch_lightning", "lightning.fabric", "lightning_fabric", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")  # Lightning's own
    # `ModelModule` moves batches.
    warnings.filterwarnings("ignore", message=".*overridden `transfer_batch_to_device`.*")
    # What is logged at the end of an epoch is the same in all processes.
    warnings.filterwarnings("ignore", message=".*recommended to use.*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode")  # what is frozen
    # Two workers are right for two cores, whatever the number of cores that Lightning sees.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    # A scoring that is resumed may have nothing left to decode.
    warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")
