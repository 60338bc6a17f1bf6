"""Where the time of a training goes, by the parts of its steps. A GPU is not waited for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

from vswin_dist.training.heartbeat import Heartbeat, Phase

Method = TypeVar("Method", bound=Callable[..., Any])
ON_DEVICE: tuple[Phase, ...] = ("forward", "backward", "optimizer")  # their time is the device's: the host runs ahead


class StepTimer:
    """Times what `with timer("forward", step):` encloses, and tells the heartbeat of it.

    Around work of a GPU two events are recorded, which it passes in its own time; they are read by `take`.
    """

    def __init__(self, device: torch.device | None = None, heartbeat: Heartbeat | None = None) -> None:
        self.heartbeat = heartbeat or Heartbeat()
        self._cuda = device is not None and device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: Phase, step: int) -> Iterator[None]:
        """Time the block as `phase` of `step`."""
        self.heartbeat.beat(phase, step)
        if self._cuda and phase in ON_DEVICE:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call. To be called where the device has done all of them."""
        for phase, begin, end in self._events:
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        found = dict(self._seconds)
        self._events.clear()
        self._seconds.clear()
        return found


def timed(phase: Phase) -> Callable[[Method], Method]:
    """Time a trainer's method, of which the first argument is the step, and log that; it ends with the device idle."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def call(trainer: Any, step: int, *args: Any) -> Any:
            with trainer.timer(phase, step):
                result = method(trainer, step, *args)
            trainer.tracking.log(step, times(trainer.timer.take()))
            return result

        return call  # type: ignore[return-value]

    return decorate


def times(seconds: dict[str, float], steps: int = 1) -> dict[str, float]:
    """Name the `seconds` that `take` returned for `steps` as metrics of one step."""
    return {f"time/{phase}_s": value / steps for phase, value in seconds.items()}
