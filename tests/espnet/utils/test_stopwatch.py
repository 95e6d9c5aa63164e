from espnet.utils import stopwatch
from espnet.utils.stopwatch import Stopwatch


def test_laps_are_summed_by_name(monkeypatch):
    times = iter([10.0, 12.0, 15.5, 16.5])
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: next(times))
    watch = Stopwatch()
    watch.lap("training")
    watch.lap("scoring")
    watch.lap("training")
    assert watch.seconds == {"training": 3.0, "scoring": 3.5}
    assert str(watch) == "Seconds: training 3, scoring 4; 6 in all"
