"""What a rank is doing, stored in memory that the process which watches it reads too: see `hang_watch`.

Imports nothing heavy: the watcher does without torch.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["start", "data", "forward", "backward", "optimizer", "log", "evaluation", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
STEP: tuple[Phase, ...] = ("data", "forward", "backward", "optimizer", "log")  # parts of one step
FIRST = 6  # times `hang_s` that the first step or round may take, each part of the start, and a checkpoint
SLOWEST = 5  # times the slowest of the last ones that another may take, where that is more than `hang_s`
LAST = 50  # how many that are
_RECORD = struct.Struct("<qqqd")
_SUM = struct.Struct("<I")  # of the record before it: who reads while it is written sees a part of it
_SIZE = _RECORD.size + _SUM.size


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    number: int = 0  # ranks beat in the same order: one whose number is lower is behind
    step: int = 0
    phase: Phase = "start"
    limit_s: float = 0.0  # until the next one


class Heartbeat:
    """A rank's own side of it: `beat` takes microseconds.

    Args:
        hang_s: how long a rank may be silent at least.
        memory: of `shared`, where somebody watches.
    """

    def __init__(self, hang_s: float = 300.0, memory: mmap.mmap | None = None) -> None:
        self.hang_s = hang_s
        self._memory = memory or mmap.mmap(-1, _SIZE)
        self._slowest: dict[str, deque[float]] = {}  # "step", "evaluation", "checkpoint" -> seconds of the last ones
        self._doing: tuple[str, int] | None = None  # one step, round or checkpoint
        self._began = self._limit_s = self._said = 0.0
        self.last = Beat()  # what was said last
        self.beat("start")

    @property
    def silent_s(self) -> float:
        """How long ago that was."""
        return time.monotonic() - self._said

    @property
    def step_s(self) -> float:
        """The mean time of the last steps; 0 where no more than the first is done."""
        times = tuple(self._slowest.get("step", ()))
        return sum(times) / len(times) if times else 0.0

    def beat(self, phase: Phase, step: int = 0) -> None:
        """Say that `phase` of `step` begins; each round of an evaluation says so."""
        kind = "step" if phase in STEP else phase
        number = self.last.number + 1
        doing = (kind, step if kind == "step" else number)
        if doing != self._doing:
            self._finish()
            self._doing, self._began, self._limit_s = doing, time.monotonic(), self._limit(kind)
        self.last = Beat(number, step, phase, self._limit_s)
        record = _RECORD.pack(number, step, PHASES.index(phase), self._limit_s)
        self._memory[:] = record + _SUM.pack(zlib.crc32(record))
        self._said = time.monotonic()

    def _finish(self) -> None:
        if self._doing is None or self._doing[0] == "start":
            return
        kind, known = self._doing[0], self._doing[0] in self._slowest
        times = self._slowest.setdefault(kind, deque(maxlen=LAST))
        if known or kind != "step":  # the first step may compile: no measure of the others
            times.append(time.monotonic() - self._began)

    def _limit(self, kind: str) -> float:
        # A checkpoint waits for the one before it, which may still be on its way to a slow storage.
        times = FIRST if kind not in self._slowest or kind == "checkpoint" else 1
        return max(times * self.hang_s, SLOWEST * max(self._slowest.get(kind, ()), default=0.0))


def read(memory: mmap.mmap) -> Beat | None:
    """Return what a rank said last in its `memory`; None while it is saying so, for ever where it is stopped just then."""
    content = memory[:]
    record = content[: _RECORD.size]
    if content[_RECORD.size :] != _SUM.pack(zlib.crc32(record)):
        return None
    number, step, phase, limit_s = _RECORD.unpack(record)
    return Beat(number, step, PHASES[phase], limit_s)


def shared(file: int) -> mmap.mmap:
    """Map the `file` in memory that a rank and its watcher share, an empty one to begin with."""
    os.ftruncate(file, _SIZE)
    return mmap.mmap(file, _SIZE)
