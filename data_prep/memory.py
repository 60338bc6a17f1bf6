"""The bound on a worker's memory: one video that needs more than its worker's part of the machine must not end the machine.

What counts is what a process has written to and cannot give back (resident, not of files). It is looked at from outside, and
the process killed: a limit of the system itself (`RLIMIT_AS`, `RLIMIT_DATA`) makes FFmpeg's own allocations fail, which it
reports as damaged video or answers by an invalid access.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.05  # in which a process takes about 100 MB more at most
FRACTION = 0.8  # of the machine's memory, for all workers together
CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # of versions 2 and 1
LIMITS = Path("/sys/fs/cgroup")


def machine_bytes() -> int:
    """Give the memory of this machine, or of the container that this runs in."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            found = min(found, int((LIMITS / name).read_text()))
    return found


def part_of(workers: int) -> int:
    """Give the memory that each of so many workers may take, bytes."""
    return int(FRACTION * machine_bytes() / workers)


def taken_by(pid: int) -> int:
    """Give the bytes that a process has taken; 0 where it has gone, or the system does not tell."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def refusal(limit: int) -> str:
    """Say why a video was given up that took more than `limit`."""
    return f"it takes more than {limit / 1e6:,.0f} MB of memory, which is what a worker may have (--worker-memory)"


class Watch:
    """Calls `look` again and again, on a thread of its own, until it is closed."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look, self._closed = look, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="memory-watch")
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.wait(POLL_S):
            self._look()

    def close(self) -> None:
        """End it."""
        self._closed.set()
        self._thread.join()
