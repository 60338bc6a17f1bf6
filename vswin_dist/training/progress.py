"""How far the ranks of a training are, for those who look from outside: a record beside the checkpoints.

The main rank writes it anew every `WRITE_S` from what it tells its `heartbeat` anyway, in a thread: no step waits for it,
and storage that does not take it is no error. `python -m vswin_dist.status` reads it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from vswin_dist import storage
from vswin_dist.device import Rank
from vswin_dist.errors import CheckpointError, FencedOut, VswinError
from vswin_dist.lease import Fence
from vswin_dist.records import read_record
from vswin_dist.training.heartbeat import Beat, Heartbeat, Phase

FILE = "progress.json"
FORMAT, VERSION = "vswin-progress", 1
WRITE_S = 10.0  # from one record to the next
LAST_S = 5.0  # that the last one may take
AFTER_STEP: tuple[Phase, ...] = ("log", "evaluation", "checkpoint")  # in which the step that is named is done


@dataclass(frozen=True)
class Progress:
    """Where the ranks are, as the main one sees it."""

    number: int  # of the lease for whose holder they work
    ranks: int
    time: float  # of this record, in seconds since 1970
    step: int  # steps done; 0 also where it is not known yet
    phase: str  # what the main rank is doing
    step_s: float  # mean seconds of the last steps; 0: not known yet
    silent_s: float  # since the main rank said something last
    limit_s: float  # after which it counts as hanging
    ended: bool = False  # the ranks are at their end: because of `error`, or in order
    error: str = ""


def read(root: str) -> Progress | None:
    """Read the record in `root`, the folder of a run's checkpoints; None where there is none.

    Raises:
        CheckpointError: it is not valid.
    """
    try:
        return read_record(
            storage.join(root, FILE), Progress, format=FORMAT, version=VERSION, what="progress", error=CheckpointError
        )
    except FileNotFoundError:
        return None


def write(root: str, progress: Progress) -> None:
    """Put `progress` into `root`."""
    body = {"format": FORMAT, "version": VERSION, **asdict(progress)}
    storage.put_bytes(storage.join(root, FILE), json.dumps(body, indent=1).encode())


@contextmanager
def shown(root: str, rank: Rank, fence: Fence, heartbeat: Heartbeat) -> Iterator[None]:
    """Keep the record in `root` up to date while the block runs, and say there how it ended; on the main rank."""
    if not rank.is_main:
        yield
        return
    writer, error = _Writer(root, rank, fence, heartbeat), ""
    try:
        yield
    except BaseException as failure:
        error = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        raise
    finally:
        writer.close(error)


class _Writer:
    """A thread that writes the record."""

    def __init__(self, root: str, rank: Rank, fence: Fence, heartbeat: Heartbeat) -> None:
        self.root, self.rank, self.fence, self.heartbeat = root, rank, fence, heartbeat
        self._error = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
        self._thread.start()

    def close(self, error: str) -> None:
        """Write the last record: the block has ended, because of `error` or in order."""
        self._error = error
        self._over.set()
        self._thread.join(LAST_S)

    def _work(self) -> None:
        over = False
        while not over:
            over = self._over.is_set()
            with suppress(VswinError, OSError):  # storage is away: the next record, or none
                try:
                    self.fence.check()
                    write(self.root, self._now(over))
                except FencedOut:  # the record is another's now
                    return
            if not over:
                self._over.wait(WRITE_S)

    def _now(self, ended: bool) -> Progress:
        beat, heartbeat = self.heartbeat.last, self.heartbeat
        return Progress(
            number=self.fence.number,
            ranks=self.rank.world_size,
            time=time.time(),
            step=steps_done(beat),
            phase=beat.phase,
            step_s=heartbeat.step_s,
            silent_s=heartbeat.silent_s,
            limit_s=beat.limit_s,
            ended=ended,
            error=self._error,
        )


def steps_done(beat: Beat) -> int:
    """Return the number of steps that are done where `beat` was said."""
    return beat.step if beat.phase in AFTER_STEP else max(0, beat.step - 1)
