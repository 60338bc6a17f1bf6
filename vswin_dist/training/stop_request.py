"""Stop a training in order: a signal to its driver, a checkpoint of the step in hand, and the end.

`ray job stop` and batch systems send SIGTERM, Slurm's `--signal` what it is told to, such as SIGUSR1. The driver puts a file
beside the checkpoints, which its ranks reach wherever they are; the main one looks for it, and all of them stop after the
same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from vswin_dist import storage
from vswin_dist.errors import StorageError, heed_interrupts

PREFIX = "stop-"  # how the names of requests begin
LOOK_EVERY_S = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class StopRequest:
    """The request that one submission be stopped, in the folder of its checkpoints."""

    root: str
    submission: str

    @property
    def url(self) -> str:
        """Of the file."""
        return storage.join(self.root, f"{PREFIX}{self.submission}")

    def make(self) -> None:
        """Ask the ranks to stop."""
        with contextlib.suppress(StorageError):  # where it fails no checkpoint can be written either: the grace time ends it
            storage.put_bytes(self.url, b"")

    def exists(self) -> bool:
        """Return True once it was made; False where the storage does not answer."""
        try:
            return storage.exists(self.url)
        except StorageError:
            return False

    @contextmanager
    def made_by_signals(self, grace_s: float) -> Iterator[threading.Event]:
        """Make it at a signal, and interrupt the block `grace_s` later, or at a second one; yields whether it was made."""
        heed_interrupts()
        made = threading.Event()
        timer = threading.Timer(grace_s, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True

        def ask() -> None:
            print(f"stopping after a checkpoint, within {grace_s:g} s; the next signal stops at once", flush=True)
            self.make()

        def answer(*_: int | FrameType | None) -> None:
            if made.is_set():
                signal.raise_signal(signal.SIGINT)
                return
            made.set()
            timer.start()
            threading.Thread(target=ask, daemon=True).start()  # storage is no business of a signal's handler

        before = {number: signal.signal(number, answer) for number in SIGNALS}
        try:
            yield made
        finally:
            timer.cancel()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was no handler of Python
            if made.is_set():
                with contextlib.suppress(StorageError):
                    storage.remove(self.url)


class StopWatch:
    """Looks for a request now and then, in a thread, so that no step waits for it."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.seen = False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.seen:
            time.sleep(LOOK_EVERY_S)
            self.seen = self.request.exists()
