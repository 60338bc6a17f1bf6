"""A clock that a test sets."""

from __future__ import annotations


class Clock:
    """Stands for the module `time` where a module asks for the time that has passed."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic
