"""Progress on stderr: how much is done, how fast, how long it will take. Redrawn on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections import deque

TERMINAL_S = 0.5
PLAIN_S = 10.0


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    whole = int(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """Counts towards `total` of `unit`; `total` may grow, and 0 means that it is not known."""

    def __init__(self, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self.total = total
        self.unit = unit
        self.done = self._before = done
        self.shown = shown
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = self._started + (0.0 if self._terminal else 2.0)
        self._recent: deque[tuple[float, int]] = deque([(self._started, done)], maxlen=60)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count on; prints when it is time to."""
        self.done += count
        now = time.monotonic()
        if self.shown and now >= self._next:
            self._next = now + (TERMINAL_S if self._terminal else PLAIN_S)
            self._recent.append((now, self.done))
            print(self._line(now, note), end="\r" if self._terminal else "\n", file=sys.stderr, flush=True)

    def close(self, note: str = "") -> None:
        """Print the last line."""
        if self.shown:
            seconds = time.monotonic() - self._started
            rate = (self.done - self._before) / max(seconds, 1e-9)
            end = "\x1b[K\n" if self._terminal else "\n"
            print(f"{self.done:,} {self.unit} in {clock(seconds)}, {rate:.1f}/s{note}", end=end, file=sys.stderr,
                  flush=True)

    def _line(self, now: float, note: str) -> str:
        since, count = self._recent[0]
        rate = (self.done - count) / max(now - since, 1e-9)
        if not self.total:
            return f"{self.done:,} {self.unit}  {rate:.1f}/s{note}"
        left = clock((self.total - self.done) / rate) if rate > 0 else "?"
        share = self.done / self.total
        erase = "\x1b[K" if self._terminal else ""
        return f"{self.done:,}/{self.total:,} {self.unit} {share:6.1%}  {rate:.1f}/s  {left} left{note}{erase}"
