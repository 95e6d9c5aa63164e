"""What a training step failed at: its utterances are written down, lack of memory has remedies."""

import json
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from datamodule.label_list import LabelList
from espnet.nets.encoders import TABLES
from espnet.nets.model_options import ModelOptions
from espnet.utils.options import Options
from espnet.utils.recovery.checkpoint_io import whole_file

# Where torch has no class for it: the CPU's allocator, and libraries that allocate by themselves.
MEMORY_MESSAGES = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "ALLOC_FAILED",
    "out of memory",
)
# What gloo and NCCL say in the processes that are left when another one has failed.
PEER_MESSAGES = ("closed by peer", "reset by peer", "remote process exited")

logger = logging.getLogger(__name__)


class FailedBatch(pl.Callback):
    """Writes the batch of a step that raised an error to `failed_batch.json`.

    It is written to the folder of the run; None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._begun: tuple[dict[str, Any], int | None] | None = None  # batch and its number
        self._record: dict[str, Any] | None = None  # of what failed
        self._file: Path | None = None

    def begin(self, batch: dict[str, Any], number: int | None) -> None:
        """Notes a batch and its number within the epoch, which is None before the first epoch."""
        self._begun = batch, number

    def end(self) -> None:
        """Notes that it went well."""
        self._begun = None

    def on_train_batch_start(
        self, _trainer: Any, _module: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Notes the batch of a step."""
        self.begin(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        """Notes that the step went well."""
        self.end()

    def on_exception(self, trainer: pl.Trainer, _module: Any, exception: BaseException) -> None:
        """Writes the file and a line to the log, if a step was under way."""
        if self._begun is None or not isinstance(exception, Exception):
            return
        if is_of_other_process(exception):
            return  # This process's batch has nothing to do with it.
        batch, number = self._begun
        self._record = {
            "epoch": trainer.current_epoch,
            "batch": number,
            "process": trainer.global_rank,
            "error": f"{type(exception).__name__}: {exception}",
            **describe(batch["indices"].tolist(), trainer.datamodule.train_dataset.labels),
        }
        if self.folder is None:
            return
        rank = f"_rank{trainer.global_rank}" if trainer.global_rank else ""
        path = self.folder / f"failed_batch{rank}.json"
        try:
            with whole_file(path) as unfinished:
                unfinished.write_text(json.dumps(self._record, indent=1, ensure_ascii=False))
        except OSError as error:  # The error of the step is the one to be seen.
            logger.error("%s", error)
            return
        self._file = path
        size = in_words(self._record)
        logger.error("A batch of %s failed: its utterances are named in %s", size, path)

    def remedy(self, error: BaseException, options: Options) -> str | None:
        """Says in a line what to do if `Trainer.fit` lacked memory, here or elsewhere.

        Returns:
            The line; None for other errors.
        """
        if is_of_other_process(error):
            return "another process of the run has failed: see its own message"
        if not is_out_of_memory(error):
            return None
        frames = f"lower --max-frames (now {options.data.max_frames})"
        others = "".join(f", or {way}" for way in _other_ways(options.model))
        if self._record is None:
            return (
                f"out of memory outside of a training step: {frames} if it was the validation, "
                f"else the size of the model{others}"
            )
        named = f" (named in {self._file})" if self._file else ""
        size = in_words(self._record)
        return f"out of memory at a batch of {size}{named}: {frames}{others}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on a GPU or in the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)
    )


def memory_problem(error: BaseException, options: Options) -> str | None:
    """Says in a line what to do about lack of memory that no training step met; None: no lack."""
    if not is_out_of_memory(error):
        return None
    return (
        "out of memory outside of training: choose a smaller model, put pretrained parts into "
        "4 bits with --use-qlora, or lower --decode-max-frames (now "
        f"{options.data.decode_max_frames}) or --beam-size if it was the scoring"
    )


def is_of_other_process(error: BaseException) -> bool:
    """Whether an error only says that another process is not there any more."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in PEER_MESSAGES)


def describe(indices: list[int], labels: LabelList) -> dict[str, Any]:
    """Names the utterances of a batch.

    Args:
        indices: Their places in the list.
        labels: The list.

    Returns:
        `frames` of the batch, padding included, and `utterances`: for each its id, its frames and
        its line in the list.
    """
    frames = [int(labels.num_frames[index]) for index in indices]
    utterances = [
        {"id": labels.utterance_id(index), "frames": number, "line": labels.where(index)}
        for index, number in zip(indices, frames, strict=True)
    ]
    return {"frames": len(frames) * max(frames, default=0), "utterances": utterances}


def in_words(record: dict[str, Any]) -> str:
    """The size of a batch that `describe` has described."""
    number = len(record["utterances"])
    return f"{number} utterance{'s' * (number != 1)} and {record['frames']} frames"


def _other_ways(options: ModelOptions) -> list[str]:
    """Flags that save memory and are not given, where there is something pretrained."""
    rows = [options.decoder.choice, *(options.encoders.choice(word) for word in TABLES)]
    pretrained = any(row is not None and row.pretrained for row in rows)
    ways = []
    if pretrained and not options.gradient_checkpointing:
        ways.append("give --gradient-checkpointing")
    if pretrained and not options.adaptation.use_qlora:
        ways.append("put pretrained parts into 4 bits with --use-qlora")
    return ways
