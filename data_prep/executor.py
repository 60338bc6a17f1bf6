"""Worker processes of this machine. One task each at a time; a worker that is killed is replaced, its task repeated."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Self

from data_prep import memory
from vswin_dist.errors import VswinError, WorkFailed

DEATHS = 5  # of workers on one task, after which the task is given up
MEMORY_DEATHS = 2  # of these for want of memory: the first worker may have kept what earlier tasks took
STARTS = 10  # that fail one after the other, after which the work is
DIED = "worker processes died on it"


@dataclass(frozen=True)
class Done:
    """A finished task: its ticket and value; `crashed` says why it was given up, where workers died on it."""

    ticket: Any
    value: Any = None
    crashed: str = ""


@dataclass(frozen=True)
class Task:
    """`function(argument)`, to be run by a worker; both must pickle. `ticket` tells it from the others."""

    ticket: Any
    function: Callable[[Any], Any]
    argument: Any


class Executor(ABC):
    """Runs tasks somewhere; `LocalExecutor` here, on a Ray cluster in `ray_executor`. Ends its workers on leaving."""

    @property
    @abstractmethod
    def room(self) -> int:
        """How many more tasks may be submitted now; the back-pressure."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Hand `task` to a worker, at once or when one is free."""

    @abstractmethod
    def wait(self) -> Done:
        """Return the next finished task. Raises what the task raised, as a VswinError."""

    @abstractmethod
    def close(self) -> None:
        """End the workers; work in progress is dropped."""

    def run(self, tasks: Iterable[Task | None]) -> Iterator[Done]:
        """Run `tasks`, taking them as there is room, and yield each as it finishes, in any order.

        None among `tasks` asks to wait: the next is taken when a running task has finished and was dealt with. The work
        is over where none runs and `tasks` gives None or ends.

        Raises:
            VswinError: what a task raised.
        """
        waiting = iter(tasks)
        running = 0
        while True:
            while self.room > 0 and (task := next(waiting, None)) is not None:
                self.submit(task)
                running += 1
            if not running:
                return
            done = self.wait()
            running -= 1
            yield done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Assignment:
    """A task, and how many workers died on it, of these for want of memory."""

    task: Task
    deaths: int = 0
    memory_deaths: int = 0


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    assignment: _Assignment | None = None
    ready: bool = False
    exceeded: bool = False  # the memory that it may have, and was killed for it


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


class LocalExecutor(Executor):
    """`workers` processes, as many as the machine has cores where it is None.

    They are started by spawn: file systems of object stores do not survive a fork. One that takes more than
    `worker_memory` bytes (None: its part of the machine's) is killed.
    """

    def __init__(self, workers: int | None = None, worker_memory: int | None = None) -> None:
        workers = workers or os.cpu_count() or 1
        self._memory = worker_memory or memory.part_of(workers)
        self._context = multiprocessing.get_context("spawn")
        self._waiting: deque[_Assignment] = deque()
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._watch = memory.Watch(self._kill_large)
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

    def _kill_large(self) -> None:
        for worker in list(self._workers):
            if worker.ready and not worker.exceeded and memory.taken_by(worker.process.pid) > self._memory:
                worker.exceeded = True
                worker.process.kill()

    @property
    def room(self) -> int:
        """See `Executor.room`; twice as many tasks as workers, so that none waits for the driver."""
        running = sum(w.assignment is not None for w in self._workers)
        return 2 * len(self._workers) - running - len(self._waiting)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [w.process.pid for w in self._workers]

    def submit(self, task: Task) -> None:
        """See `Executor.submit`."""
        self._waiting.append(_Assignment(task))
        self._feed()

    def _feed(self) -> None:
        for worker in self._workers:
            if worker.ready and worker.assignment is None and self._waiting:
                worker.assignment = self._waiting.popleft()
                with contextlib.suppress(OSError):  # it died: `wait` will see the end of its pipe
                    worker.pipe.send((worker.assignment.task.function, worker.assignment.task.argument))

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
                assert worker.assignment is not None
                ticket, worker.assignment = worker.assignment.task.ticket, None
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
        lost = worker.assignment
        if lost is None:
            return None
        lost.deaths += 1
        lost.memory_deaths += worker.exceeded
        if lost.memory_deaths >= MEMORY_DEATHS:
            return Done(lost.task.ticket, crashed=memory.refusal(self._memory))
        if lost.deaths >= DEATHS:
            return Done(lost.task.ticket, crashed=DIED)
        self._waiting.appendleft(lost)
        self._feed()
        return None

    def close(self) -> None:
        """See `Executor.close`."""
        self._watch.close()
        for worker in self._workers:
            worker.pipe.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
        self._workers.clear()
