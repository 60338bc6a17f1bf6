"""Worker processes of this machine. One task each at a time; a worker that is killed is replaced, its task repeated."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from vswin_dist.errors import VswinError, WorkFailed

DEATHS = 5  # of workers on one task, after which the task is given up
STARTS = 10  # that fail one after the other, after which the work is


@dataclass(frozen=True)
class Done:
    """A finished task: its ticket and value; `crashed` where workers died on it `DEATHS` times."""

    ticket: Any
    value: Any = None
    crashed: bool = False


class Executor(Protocol):
    """Runs tasks somewhere; `LocalExecutor` here, on a Ray cluster in `ray_executor`."""

    @property
    def room(self) -> int:
        """How many more tasks may be submitted now; the back-pressure."""

    def submit(self, ticket: Any, function: Callable[[Any], Any], argument: Any) -> None:
        """Run ``function(argument)`` on a worker; both must pickle."""

    def wait(self) -> Done:
        """The next finished task. Raises what the task raised, as a VswinError."""

    def close(self) -> None:
        """End the workers."""


@dataclass
class _Task:
    ticket: Any
    function: Callable[[Any], Any]
    argument: Any
    deaths: int = 0


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: _Task | None = None
    ready: bool = False


def _worker_main(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business
    # webdataset imports torch where it is installed: seconds and 200 MB per worker for nothing.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    pipe.send(("ready", None))
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):  # the driver has gone
            return
        if task is None:
            return
        function, argument = task
        try:
            answer: tuple[str, Any] = ("value", function(argument))
        except VswinError as error:
            answer = ("error", error)
        except BaseException as error:
            answer = ("error", WorkFailed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        try:
            pipe.send(answer)
        except OSError:
            return


class LocalExecutor:
    """`workers` processes, started by spawn: file systems of object stores do not survive a fork."""

    def __init__(self, workers: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._waiting: deque[_Task] = deque()
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker_main, args=(theirs,), daemon=True, name="data-prep-worker")
        process.start()
        theirs.close()
        return _Worker(process, ours)

    @property
    def room(self) -> int:
        """See `Executor.room`: twice as many tasks as workers, so that none waits for the driver."""
        running = sum(w.task is not None for w in self._workers)
        return 2 * len(self._workers) - running - len(self._waiting)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [w.process.pid for w in self._workers]

    def submit(self, ticket: Any, function: Callable[[Any], Any], argument: Any) -> None:
        """See `Executor.submit`."""
        self._waiting.append(_Task(ticket, function, argument))
        self._feed()

    def _feed(self) -> None:
        for worker in self._workers:
            if worker.ready and worker.task is None and self._waiting:
                worker.task = self._waiting.popleft()
                with contextlib.suppress(OSError):  # it died: `wait` will see the end of its pipe
                    worker.pipe.send((worker.task.function, worker.task.argument))

    def wait(self) -> Done:
        """See `Executor.wait`."""
        while True:
            ready = wait([w.pipe for w in self._workers])
            for worker in [w for w in self._workers if w.pipe in ready]:
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, OSError):
                    lost = self._replace(worker)
                    if lost is not None:
                        return lost
                    continue
                if kind == "ready":
                    worker.ready = True
                    self._failed_starts = 0
                    self._feed()
                    continue
                assert worker.task is not None
                ticket, worker.task = worker.task.ticket, None
                self._feed()
                if kind == "error":
                    raise value
                return Done(ticket, value)

    def _replace(self, worker: _Worker) -> Done | None:
        """Start another process for a dead worker; its task goes first in the queue, or is given up."""
        worker.process.join()
        worker.pipe.close()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= STARTS:
                raise WorkFailed(f"worker processes end at once, with exit code {worker.process.exitcode}")
        self._workers[self._workers.index(worker)] = self._start()
        task = worker.task
        if task is None:
            return None
        task.deaths += 1
        if task.deaths >= DEATHS:
            return Done(task.ticket, crashed=True)
        self._waiting.appendleft(task)
        self._feed()
        return None

    def close(self) -> None:
        """See `Executor.close`. Work in progress is dropped."""
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()
