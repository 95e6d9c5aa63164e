import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

from espnet.utils.recovery.checkpoint_io import (
    UNFINISHED,
    WholeFileCheckpointIO,
    WriteError,
    remove_unfinished,
    save_whole,
    whole_file,
)

FULL = Path("/dev/full")  # Linux's device that never has room
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_file_is_there_only_once_it_is_complete(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
        assert unfinished.parent == tmp_path
    assert path.read_text() == "new"
    assert names(tmp_path) == {"config.yaml"}


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
def test_an_error_of_another_kind_leaves_the_old_file_and_passes(tmp_path, error):
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def fail(unfinished):
        unfinished.write_text("half")
        raise error("of another kind")

    with pytest.raises(error, match="^of another kind$"), whole_file(path) as unfinished:
        fail(unfinished)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"config.yaml"}


def test_what_a_killed_process_left_is_overwritten_or_removed(tmp_path):
    for name in ("last.ckpt", "epoch=3.ckpt"):
        (tmp_path / f"{name}{UNFINISHED}").write_bytes(b"half of a checkpoint")
    save_whole({"weight": torch.ones(2)}, tmp_path / "last.ckpt")
    assert names(tmp_path) == {"last.ckpt", f"epoch=3.ckpt{UNFINISHED}"}
    remove_unfinished(tmp_path)
    assert names(tmp_path) == {"last.ckpt"}


def test_checkpoints_come_back(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    plugin = WholeFileCheckpointIO()
    plugin.save_checkpoint({"weight": torch.arange(3.0), "epoch": 2}, path)
    found = plugin.load_checkpoint(path)
    torch.testing.assert_close(found["weight"], torch.arange(3.0))
    assert found["epoch"] == 2


def test_checkpoints_with_code_are_not_loaded_whatever_is_asked_for(tmp_path):
    torch.save({"code": os.getcwd}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        WholeFileCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)


def test_storage_options_are_refused(tmp_path):
    with pytest.raises(TypeError, match="has no storage options, got 1"):
        WholeFileCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt", 1)


def test_there_is_no_second_copy_in_memory(tmp_path):
    content = {"weight": torch.zeros(1_000_000)}  # 4 MB
    tracemalloc.start()
    save_whole(content, tmp_path / "last.ckpt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@needs_full
@pytest.mark.parametrize(
    ("others", "remedy"),
    [
        ([], "there is no checkpoint yet, so make room and start again"),
        (["best.ckpt"], "there is no checkpoint yet"),
        (["epoch=0.ckpt", "last.ckpt"], "last.ckpt is the last good .* with --ckpt-path last$"),
        (["last.ckpt", "epoch=1.ckpt"], "epoch=1.ckpt is the last good .*--ckpt-path .*=1.ckpt$"),
    ],
)
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_full_disk_names_the_last_good_checkpoint(tmp_path, others, remedy, size):
    for number, name in enumerate(others):
        save_whole({}, tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    path = tmp_path / "model_avg_10.pth"
    (tmp_path / f"{path.name}{UNFINISHED}").symlink_to(FULL)
    message = rf"{path} could not be written \(No space left on device\): .*{remedy}"
    with pytest.raises(WriteError, match=message):
        save_whole({"weight": torch.zeros(size)}, path)
    assert names(tmp_path) == set(others)


LIMITED = """
import resource, sys
import torch
from espnet.utils.recovery.checkpoint_io import save_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for size in range(40_000, 60_000, 1_000):  # The limit is met in each part of the file.
    try:
        save_whole({"weight": torch.full([size], 1.0), "size": size}, sys.argv[1])
    except OSError as error:
        print(size, error)
"""


def test_a_limit_in_the_middle_of_a_file_leaves_the_last_good_one(tmp_path):
    path = tmp_path / "last.ckpt"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[4],
    )
    lines = done.stdout.splitlines()
    found = torch.load(path, weights_only=True)
    sizes = [int(line.split()[0]) for line in lines]
    assert sizes == list(range(found["size"] + 1_000, 60_000, 1_000))
    assert found["size"] >= 40_000
    torch.testing.assert_close(found["weight"], torch.ones(found["size"]))
    assert all(f"{path} could not be written (File too large)" in line for line in lines)
    assert names(tmp_path) == {"last.ckpt"}
