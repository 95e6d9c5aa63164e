"""What the parts of a run take."""

import time


class Stopwatch:
    """Sums up the seconds of parts that follow each other; it starts at once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a part: what was done since the one before gets a name."""
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        return f"Seconds: {parts}; {sum(self.seconds.values()):.0f} in all"
