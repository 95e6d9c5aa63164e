"""Callbacks of a training run: the metrics table and progress without a terminal."""

import csv
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

from espnet.utils.recovery.checkpoint_io import whole_file, write_errors

LOGGED = (  # what the model logs
    *("loss", "loss_ctc", "loss_att", "decoder_acc"),
    *("loss_val", "loss_ctc_val", "loss_att_val", "decoder_acc_val", "wer_val"),
    *("bad_clips", "skipped_utterances", "short_utterances", "nonfinite_steps"),
)
LINE_STEPS = 50  # between two lines of progress
COLUMNS = ("epoch", "step", "seconds", "lr", *LOGGED)


class MetricsTable(pl.Callback):
    """Writes a row an epoch to a CSV file; a resumed run goes on where it left off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = 0.0

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Keeps the rows of the steps that lie behind."""
        rows = [row for row in read_metrics(self.path) if int(row["step"]) <= trainer.global_step]
        self.start = time.time() - (float(rows[-1]["seconds"]) if rows else 0.0)
        with whole_file(self.path) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Adds the epoch's row."""
        metrics = trainer.callback_metrics
        row = {name: f"{float(metrics[name]):.6g}" for name in LOGGED if name in metrics}
        row["epoch"] = trainer.current_epoch
        row["step"] = trainer.global_step
        row["seconds"] = f"{time.time() - self.start:.1f}"
        row["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.6g}"
        with write_errors(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Reads what `MetricsTable` wrote: texts by column for each epoch, none without the file."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    # A process that was killed may have left the last line unfinished.
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


class ProgressLines(pl.Callback):
    """Prints a line every few steps, where there is no terminal for a progress bar."""

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, _module: Any, _outputs: Any, _batch: Any, batch_idx: int
    ) -> None:
        """Prints the training loss."""
        if (batch_idx + 1) % LINE_STEPS == 0:
            loss = float(trainer.callback_metrics.get("loss_step", float("nan")))
            print(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} "
                f"batch {batch_idx + 1}/{trainer.num_training_batches} loss {loss:.3f}",
                flush=True,
            )

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Prints the epoch's figures."""
        metrics = trainer.callback_metrics
        names = ("loss", "loss_val", "decoder_acc_val", "wer_val")
        values = " ".join(f"{name} {float(metrics[name]):.3f}" for name in names if name in metrics)
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} done: {values}", flush=True)
