"""Saving in the middle of an epoch: every few minutes, and when a signal asks the run to end."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch

from datamodule.loaders import STOPPING_SIGNALS


class Interrupted(Exception):
    """A signal, `number`, has ended the run; `state` says in words what was saved before."""

    def __init__(self, number: int, state: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: {state}")
        self.number = number


class Interruption(pl.Callback):
    """Saves `last.ckpt` after a step, and ends the run after that if a signal asks for it.

    It also saves every few minutes. Processes may get a signal in different steps, or only one of
    them gets it. So each tells the others with a reduction that every step makes
    (`ModelModule.wishes`), and all of them save after the same step. In validation they may have
    different numbers of batches: a signal waits until it is over, and the checkpoint of the epoch
    is there.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path = path
        self.seconds = 60 * minutes
        self._received: set[int] = set()  # signals that this process got
        self._agreed = [0.0] * (len(STOPPING_SIGNALS) + 1)
        self._place: dict[str, int] | None = None
        self._shares: dict[str, int] | None = None
        self._saved_at = 0.0
        self._saving = False
        self._epoch_is_over = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes signals instead of ending at once; the handlers before it come back after it."""
        before = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number in STOPPING_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received.add(number)

    def on_sanity_check_start(self, *_: Any) -> None:
        """Replaces Lightning's handlers: they end in a collective call, or requeue the job."""
        self._listen()

    def on_load_checkpoint(self, _trainer: Any, _module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the place in the data, and how the data was shared out."""
        places = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader")
        self._place = places[0] if places else None
        self._shares = checkpoint.get("shares")

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Replaces handlers where there is no sanity check, too, and finds the place in the data.

        Lightning itself forgets the place if an optimiser is built that knows its number of steps.

        Raises:
            ValueError: If the place is in the middle of an epoch with other batches.
        """
        self._listen()
        if self._place is not None:
            if self._place["epoch"] == trainer.current_epoch:
                _check_shares(self._shares, _shares(trainer))
            trainer.train_dataloader.load_state_dict(self._place)
            self._place = None
        self._saved_at = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Says what this process wants; only the first one watches for the time to save."""
        due = trainer.is_global_zero and time.monotonic() - self._saved_at >= self.seconds
        pl_module.wishes = [*self._wishes(), float(due)]

    def _wishes(self) -> list[float]:
        return [float(number in self._received) for number in STOPPING_SIGNALS]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        _outputs: Any,
        _batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves if any process wanted it, but never between the batches of one step."""
        self._agreed = [max(pair) for pair in zip(self._agreed, pl_module.agreed, strict=True)]
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not stepped or not any(self._agreed):
            return
        self._saving = True
        trainer.save_checkpoint(self.path)
        self._saving = False
        self._saved_at = time.monotonic()
        of_epoch = f"batch {batch_idx + 1}/{trainer.num_training_batches}"
        self._stop_if_agreed(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, {of_epoch}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, _module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Leaves the validation to be done, if the batch is the last of its epoch."""
        checkpoint["shares"] = _shares(trainer)
        if self._saving and trainer.is_last_batch:
            put_before_validation(checkpoint["loops"]["fit_loop"])

    def on_train_epoch_end(self, *_: Any) -> None:
        """Notes that the checkpoint of an epoch is about to be written."""
        self._epoch_is_over = True
        self._saved_at = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the run if a signal came in the validation before, or in between."""
        if self._epoch_is_over:
            self._epoch_is_over = False
            self._agree(trainer, pl_module)
            self._stop_if_agreed(f"epoch {trainer.current_epoch}/{trainer.max_epochs}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends the run if a signal came in the last epoch: what would follow is not begun."""
        self._agree(trainer, pl_module)
        self._stop_if_agreed(f"epoch {trainer.current_epoch}/{trainer.max_epochs}")

    def _agree(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wishes = torch.tensor([*self._wishes(), 0.0], device=pl_module.device)
        self._agreed = trainer.strategy.reduce(wishes, reduce_op="sum").tolist()

    def _stop_if_agreed(self, place: str) -> None:
        agreed, self._agreed = self._agreed, [0.0] * len(self._agreed)
        for number, wanted in zip(STOPPING_SIGNALS, agreed, strict=False):
            if wanted:
                raise Interrupted(
                    number,
                    f"{self.path} holds the state after {place}; go on with the same command and "
                    "--ckpt-path last",
                )


def _shares(trainer: pl.Trainer) -> dict[str, int]:
    return {"processes": trainer.world_size, "batches": int(trainer.num_training_batches)}


def _check_shares(before: dict[str, int] | None, now: dict[str, int]) -> None:
    """Makes sure that a number of batches means the same utterances as before."""
    if before is not None and before != now:
        raise ValueError(
            f"the checkpoint is from the middle of an epoch of {before['batches']} batches in "
            f"{before['processes']} process(es), now there are {now['batches']} in "
            f"{now['processes']}: go on with the same data, --max-frames and --gpus, or from the "
            "end of an epoch (--ckpt-path epoch=N.ckpt)"
        )


def put_before_validation(fit_loop: dict[str, Any]) -> None:
    """Turns the state after the last batch of an epoch into one that goes on with its validation.

    Lightning takes the state after a last batch, as its loops give it, for that of an epoch that
    is over, validation and all. The state is changed in place.
    """
    for counts in ("total", "current"):
        batches = fit_loop["epoch_loop.batch_progress"][counts]
        batches["completed"] = batches["processed"]
        # As if it had been stopped within the first batch of the validation.
        validation = fit_loop["epoch_loop.val_loop.batch_progress"][counts]
        validation.update(ready=1, started=1, processed=0, completed=0)


@contextmanager
def ending_together(trainer: pl.Trainer) -> Iterator[None]:
    """Ends the processes that the trainer has started if an error ends this one.

    They would wait for it for ever.
    """
    try:
        yield
    except Exception:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise


def exit_interrupted(stop: Interrupted, *, is_first: bool) -> None:
    """Ends this process as a shell reports a signal.

    All processes but the first end with 0: Lightning watches them, and kills the first one at once
    if they end with anything else.

    Raises:
        SystemExit: Always.
    """
    if is_first:
        print(stop, file=sys.stderr, flush=True)
    sys.exit(128 + stop.number if is_first else 0)
