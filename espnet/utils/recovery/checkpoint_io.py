"""Files that are whole or not there at all: checkpoints, and what else a run writes at once."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

UNFINISHED = ".unfinished"  # suffix of what is being written
LAST = "last.ckpt"
ZIP_WRITER = "inline_container"  # torch's; its errors name this file of its source


class WriteError(OSError):
    """A file of a run could not be written."""


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that a killed process or a full disk cannot leave in halves.

    A checkpoint goes to the disk tensor by tensor, so there is no second copy of it in memory.

    Args:
        read: Contents of checkpoints by path, which are given once instead of reading the file.
    """

    def __init__(self, read: Mapping[str, dict[str, Any]] | None = None) -> None:
        super().__init__()
        self._read = dict(read or {})

    def save_checkpoint(
        self,
        checkpoint: Mapping[str, Any],
        path: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        """Writes a checkpoint; what has its name stays until the new one is complete.

        Raises:
            TypeError: If there are storage options: Lightning's own class refuses them too.
            WriteError: If it cannot be written.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} has no storage options, got {storage_options}")
        with write_errors(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_whole(checkpoint, path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool | None = True,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Reads a checkpoint: tensors and plain values only, whatever `weights_only` says."""
        if (content := self._read.pop(str(path), None)) is not None:
            return content
        return super().load_checkpoint(path, map_location, weights_only=True)


def save_whole(content: Any, path: str | Path) -> None:
    """Saves with `torch.save` into a file that is whole or not there.

    Raises:
        WriteError: If it cannot be written.
    """
    # Given a path, torch writes by itself and does not tell why it could not.
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        torch.save(content, file)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a name to write to, and renames the file once it is complete and on the disk.

    The name, in the same folder, is always the same: what a killed process has left is overwritten.

    Raises:
        WriteError: If it cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with write_errors(path):
            yield unfinished
            _synchronise(unfinished)
            os.replace(unfinished, path)
            _synchronise(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turns errors of writing a file into one that says what to do.

    Raises:
        WriteError: Instead of an OSError, or of an error of torch's writer.
    """
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError) as error:
        if (cause := _cause(error)) is None:
            raise
        raise WriteError(f"{path} could not be written ({cause}): {_remedy(Path(path))}") from None


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process was writing to the folder of a run."""
    for path in folder.glob(f"*{UNFINISHED}"):
        path.unlink()


def _synchronise(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _cause(error: BaseException | None) -> str | None:
    """Why a file could not be written; None for errors of another kind.

    torch's writer, stopped by an error, stumbles over its own unfinished work and raises again.
    """
    of_writer = False
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        of_writer = of_writer or ZIP_WRITER in str(error)
        error = error.__context__
    return "the disk may be full" if of_writer else None


def _remedy(path: Path) -> str:
    """Names the newest checkpoint and how to go on from it."""
    last = path.with_name(LAST)
    found = [file for file in [last, *path.parent.glob("epoch=*.ckpt")] if file.is_file()]
    if not found:
        return "there is no checkpoint yet, so make room and start again"
    newest = max(found, key=lambda file: (file.stat().st_mtime_ns, file == last))
    name = "last" if newest == last else newest
    return f"{newest} is the last good checkpoint, so make room and go on with --ckpt-path {name}"
