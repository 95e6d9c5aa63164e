import os
import signal
from argparse import Namespace

import pytest

from espnet.utils.recovery.interruption import (
    Interrupted,
    Interruption,
    ending_together,
    exit_interrupted,
    put_before_validation,
)

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)


def test_signals_are_noted_and_handlers_come_back(tmp_path):
    got = []
    before = [signal.signal(number, lambda number, _: got.append(number)) for number in NUMBERS]
    try:
        with Interruption(tmp_path / "last.ckpt", 30).listening():
            for number in NUMBERS:
                os.kill(os.getpid(), number)
        assert got == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)


def test_handlers_come_back_after_an_error(tmp_path):
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(KeyError), Interruption(tmp_path / "last.ckpt", 30).listening():
        raise KeyError
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_the_first_process_reports_the_signal_and_no_other(capsys):
    stop = Interrupted(signal.SIGUSR1, "saved")
    with pytest.raises(SystemExit) as info:
        exit_interrupted(stop, is_first=False)
    assert info.value.code == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as info:
        exit_interrupted(stop, is_first=True)
    assert info.value.code == 128 + signal.SIGUSR1
    assert capsys.readouterr().err == "stopped by SIGUSR1: saved\n"


@pytest.mark.parametrize("error", [None, ValueError, SystemExit])
def test_started_processes_end_with_an_error(error):
    killed = []
    trainer = Namespace(strategy=Namespace(launcher=Namespace(kill=killed.append)))

    def run():
        with ending_together(trainer):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert killed == ([signal.SIGKILL] if error is ValueError else [])


def test_a_last_batch_is_put_before_its_validation():
    batches = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    validation = {"ready": 0, "started": 0, "processed": 0, "completed": 0}
    loops = {
        "epoch_loop.batch_progress": {"total": dict(batches), "current": dict(batches)},
        "epoch_loop.val_loop.batch_progress": {
            "total": {**validation, "ready": 4},
            "current": dict(validation),
        },
    }
    put_before_validation(loops)
    for counts in ("total", "current"):
        assert loops["epoch_loop.batch_progress"][counts]["completed"] == 6
        assert loops["epoch_loop.val_loop.batch_progress"][counts] == {
            **{"ready": 1, "started": 1},
            **{"processed": 0, "completed": 0},
        }
