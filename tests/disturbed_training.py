"""Trains as train.py does, writes down every step, and sends itself a signal on the way.

python tests/disturbed_training.py STEPS MOMENTS SIGNAL [options of train.py]

STEPS.N gets a line for each step of process N; MOMENTS are `moment:epoch:batch` as `Disturber` has
them, with commas between them, and with `:N` if only process N is to get the signal; or `never`.
"""

import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))  # When it is run as a script.

import pytest
import pytorch_lightning as pl
import torch

import train


class Recorder(pl.Callback):
    """Writes the steps of each process down: epoch, batch, utterances and loss."""

    def __init__(self, steps):
        self.steps = Path(steps)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = float(trainer.callback_metrics["loss_step"])
        step = [trainer.current_epoch, batch_idx, batch["indices"].tolist(), loss]
        with self.steps.with_suffix(f".{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(step) + "\n")


class Disturber(pl.Callback):
    """Sends the signal at its moments.

    Moments: `step` (a step is over, and saved if it is to be), `validation` (its batch begins),
    `row` (metrics.csv has its row, the checkpoint is not yet there), `write` (half of a checkpoint
    is written; batch counts the checkpoints of the epoch).
    """

    def __init__(self, moments, number):
        self.moments = moments
        self.number = number
        self.rank = 0
        self.epoch = 0
        self.writes = 0

    def reached(self, name, epoch, batch):
        moment = f"{name}:{epoch}:{batch}"
        if moment in self.moments or f"{moment}:{self.rank}" in self.moments:
            os.kill(os.getpid(), self.number)

    def on_train_start(self, trainer, pl_module):
        self.rank = trainer.global_rank

    def on_train_epoch_start(self, trainer, pl_module):
        self.epoch, self.writes = trainer.current_epoch, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.reached("step", trainer.current_epoch, batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.reached("validation", trainer.current_epoch, batch_idx)

    def on_train_epoch_end(self, trainer, pl_module):
        self.reached("row", trainer.current_epoch, 0)

    def save(self, content, file):
        """Stands for `torch.save`, with a pause when half of the file is there."""
        saved = io.BytesIO()
        torch.save(content, saved)
        half = len(saved.getvalue()) // 2
        file.write(saved.getvalue()[:half])
        file.flush()
        self.reached("write", self.epoch, self.writes)
        file.write(saved.getvalue()[half:])
        self.writes += 1


def main(steps, moments, signal_name, *arguments):
    disturber = Disturber(moments.split(","), getattr(signal, signal_name))
    make_callbacks = train.make_callbacks

    def with_disturber(args, run_dir):
        return [Recorder(steps), *make_callbacks(args, run_dir), disturber]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.make_callbacks", with_disturber)
        patch.setattr(
            "espnet.utils.recovery.checkpoint_io.torch", SimpleNamespace(save=disturber.save)
        )
        train.main(list(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
