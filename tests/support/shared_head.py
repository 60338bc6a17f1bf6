"""The Ray head that the tests of a process share. An idle one computes too: it ends when none has used it for a while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

from infra.local.cluster import Cluster, local_cluster

IDLE_S = 60.0


class SharedHead:
    """Started by the first who uses it, and again by who comes after its end."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self._cluster: Cluster | None = None
        self._running = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._users = 0
        self._timer = threading.Timer(0, self._end_if_idle)

    @contextlib.contextmanager
    def used(self, environment: Mapping[str, str]) -> Iterator[Cluster]:
        """The head, whose processes see `environment` where it is started now."""
        self._timer.cancel()
        with self._lock:
            if self._cluster is None:
                self._cluster = self._running.enter_context(local_cluster(self.cpus, env=dict(environment)))
            found = self._cluster
            self._users += 1
        try:
            yield found
        finally:
            with self._lock:
                self._users -= 1
            self._timer = threading.Timer(IDLE_S, self._end_if_idle)
            self._timer.daemon = True
            self._timer.start()

    def _end_if_idle(self) -> None:
        with self._lock:
            if not self._users:
                self._running.close()
                self._cluster = None

    def end(self) -> None:
        """End it where it runs; nobody uses it."""
        self._timer.cancel()
        self._end_if_idle()
