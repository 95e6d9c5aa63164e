"""What the parts of a run take."""

import time


class Stopwatch:
    """Sums up the seconds of what is done one after the other; starts at once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a part.

        Args:
            name: What has been done since the part before.
        """
        now = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self.seconds.items())
        return f"Seconds: {parts}; {sum(self.seconds.values()):.0f} in all"
