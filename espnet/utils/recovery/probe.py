"""A trial of the largest batches, so that a run which is out of memory is so at once."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from datamodule.loaders import model_inputs
from espnet.utils.recovery.failed_batch import FailedBatch, describe, in_words

GIGABYTE = 1e9


class ProbeBatch(pl.Callback):
    """Computes the loss and gradients of the largest batches before the first step.

    It leaves no trace: weights, statistics, gradients, the optimiser's state, random generators
    and the order of the data are as they were. `failed` names a batch that fails.
    """

    def __init__(self, failed: FailedBatch) -> None:
        self.failed = failed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tries the batches, in all processes at the same time.

        Raises:
            ValueError: If the strategy spreads the weights over processes.
        """
        name = type(trainer.strategy).__name__
        if not name.startswith(("SingleDevice", "DDP")):
            raise ValueError(f"--probe-batch cannot try batches with {name}: leave it out")
        loader = trainer.train_dataloader
        with _no_trace(pl_module):
            states = _missing_states(trainer.optimizers)
            for keys in loader.batch_sampler.largest_batches():
                batch = trainer.strategy.batch_to_device(loader.load(keys))
                self.failed.begin(batch, None)
                self._try(trainer, pl_module, batch)
                self.failed.end()
            del states
        if pl_module.device.type == "cuda":
            torch.cuda.empty_cache()

    def _try(self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict[str, Any]) -> None:
        size = torch.tensor(float(len(batch["indices"])), device=module.device)
        if not trainer.strategy.reduce(size, reduce_op="min"):
            return  # Some process has bad clips only: training would skip the batch, too.
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with trainer.precision_plugin.train_step_context():
            loss, *_ = module.model(*model_inputs(batch), batch["targets"])
        loss.backward()
        for parameter in module.parameters():
            parameter.grad = None
        peak = torch.tensor(_peak_bytes(module.device), device=module.device)
        peak = float(trainer.strategy.reduce(peak, reduce_op="max"))
        if trainer.is_global_zero:
            labels = trainer.datamodule.train_dataset.labels
            words = in_words(describe(batch["indices"].tolist(), labels))
            print(f"Largest batch: {words}, peak memory {peak / GIGABYTE:.2f} GB", flush=True)


@contextmanager
def _no_trace(module: nn.Module) -> Iterator[None]:
    """Puts back what forward and backward passes change."""
    gradients = [parameter.grad for parameter in module.parameters()]
    buffers = [buffer.clone() for buffer in module.buffers()]
    with isolate_rng():
        yield
    with torch.no_grad():
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient


def _missing_states(optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    """Takes the memory of the moments that AdamW will make in its first step."""
    states = []
    for optimizer in optimizers:
        small = "8bit" in type(optimizer).__name__
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if optimizer.state.get(parameter):
                    continue
                dtype = torch.uint8 if small else parameter.dtype
                # Ones, since memory that is only promised is not taken yet.
                states += [torch.ones_like(parameter, dtype=dtype) for _ in range(2)]
    return states


def _peak_bytes(device: torch.device) -> float:
    """Most memory that was taken: of the GPU by tensors, or of the machine by this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
