"""Tasks on the nodes of a Ray cluster. The one module of this package that imports Ray.

Bytes never pass through the driver: tasks read the source and write to the staging folder, which every node must
reach; only archives are read by the driver. Ray repeats a task whose worker or node died.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from data_prep import memory
from data_prep.executor import DEATHS, DIED, Done, Executor, Task
from vswin_dist.errors import VswinError, WorkFailed

_WAIT_S = 10.0  # after which the number of the cluster's processors is looked up again


def _call(limit: int | None, function: Callable[[Any], Any], argument: Any) -> Any:
    """Run a task in a process that ends itself where it takes more than `limit` bytes (None: its part of the node's)."""
    most = limit or memory.part_of(os.cpu_count() or 1)
    watch = memory.Watch(lambda: os._exit(1) if memory.taken_by(os.getpid()) > most else None)
    try:
        return function(argument)
    except VswinError as error:
        return error  # returned, not raised: Ray would repeat the task
    finally:
        watch.close()


class RayExecutor(Executor):
    """One processor for each task, on all nodes; as many tasks in flight as twice the processors."""

    def __init__(self, address: str, workers: int | None = None, worker_memory: int | None = None) -> None:
        """Connect to the cluster at `address` ("auto" for the one this runs in, "local" for one of its own).

        Raises:
            WorkFailed: there is none.
        """
        self._workers, self._memory = workers, worker_memory
        self._connected = not ray.is_initialized()
        if self._connected:
            try:
                dashboard = False if address == "local" else None  # ten processes, for a Ray that ends with this
                ray.init(address=address, log_to_driver=False, logging_level="warning", include_dashboard=dashboard)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise WorkFailed(f"no Ray cluster at {address}: {error}") from error
        self._remote = ray.remote(num_cpus=1, max_retries=DEATHS - 1)(_call)
        self._tickets: dict[Any, Any] = {}
        self._processors = self._count()

    def _count(self) -> int:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        return max(1, min(cpus, self._workers) if self._workers else cpus)

    @property
    def room(self) -> int:
        """See `Executor.room`."""
        return 2 * self._processors - len(self._tickets)

    def submit(self, task: Task) -> None:
        """See `Executor.submit`."""
        self._tickets[self._remote.remote(self._memory, task.function, task.argument)] = task.ticket

    def wait(self) -> Done:
        """See `Executor.wait`."""
        while True:
            ready, _ = ray.wait(list(self._tickets), num_returns=1, timeout=_WAIT_S)
            if ready:
                break
            self._processors = self._count()  # nodes come and go
        ticket = self._tickets.pop(ready[0])
        try:
            value = ray.get(ready[0])
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
            return Done(ticket, crashed=DIED)
        except ray.exceptions.RayError as error:
            raise WorkFailed(f"{type(error).__name__}: {error}") from error
        if isinstance(value, VswinError):
            raise value
        return Done(ticket, value)

    def close(self) -> None:
        """See `Executor.close`. A connection made here is given up."""
        for reference in self._tickets:
            ray.cancel(reference, force=True)
        self._tickets.clear()
        if self._connected:
            ray.shutdown()
