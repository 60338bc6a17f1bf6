"""Metrics from rank 0 to MLflow without ever holding up the training.

`MetricLogger.log` puts values into a bounded buffer in memory; a daemon thread sends them in order. A store that is
slow or away makes the buffer grow, then lose its oldest values, which are counted. A batch is repeated with the
timestamps that it had, which the store recognises, so that a request answered too late does not double its values.
"""

from __future__ import annotations

import collections
import logging
import re
import threading
import time
from collections.abc import Mapping

from vswin_dist.tracking import backend

CAPACITY = 100_000  # values: about 12 MB
THREAD_NAME = "mlflow-metrics"
BATCH = 1000  # MLflow's limit for one request
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
Row = tuple[str, float, int, int]  # name, value, time in ms since 1970, step
_NAME = re.compile(r"^[\w\-. /:]{1,250}$")
_log = logging.getLogger(__name__)


def _not_from_here(record: logging.LogRecord) -> bool:
    return record.threadName != THREAD_NAME


class MetricLogger:
    """Sends metrics of the run `run_id`; one per training, on rank 0.

    Steps never repeat: of each metric, steps at or below the last one that the store holds are skipped, so a training
    that goes back to its checkpoint after a restart continues each curve where it had ended.
    """

    def __init__(self, uri: str, run_id: str, capacity: int = CAPACITY) -> None:
        self._uri, self._run_id, self._capacity = uri, run_id, capacity
        self._waiting: collections.deque[Row] = collections.deque()
        self._sending: list[Row] = []  # taken from `_waiting`, not yet acknowledged
        self._last: dict[str, int] | None = None  # metric -> last step in the store or sent; None: not yet asked
        self._lost = 0
        self._changed = threading.Condition()
        self._closing = self._abandoned = self._warned = False
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take `values` of global step `step`; returns at once.

        Raises:
            ValueError: a name that MLflow does not allow (letters, digits and ``_-. /:``), or a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        if bad := [n for n in values if not _NAME.match(n)]:
            raise ValueError(f"metric name {bad[0]!r}: only letters, digits and _-. /: are allowed")
        now = int(time.time() * 1000)
        with self._changed:
            self._waiting.extend((name, float(value), now, step) for name, value in values.items())
            while len(self._waiting) > self._capacity:
                self._waiting.popleft()
                self._lost += 1
            self._changed.notify_all()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until the store has everything; False where `timeout_s` passed before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending() or not self._thread.is_alive(), timeout_s)

    def close(self, timeout_s: float = 30.0) -> int:
        """Send what waits, for at most `timeout_s`, and stop; returns the number of values that were lost."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            lost = self._lost + len(self._waiting) + len(self._sending)
        if lost:
            _log.warning("MLflow at %s: %d metric values of run %s were not taken and are lost",
                         backend.safe_uri(self._uri), lost, self._run_id)
        return lost

    def _pending(self) -> bool:
        return bool(self._waiting or self._sending)

    def _work(self) -> None:
        wait = FIRST_WAIT_S
        # The HTTP library reports every attempt of its own; one warning of ours stands for all of them.
        logging.getLogger("urllib3.connectionpool").addFilter(_not_from_here)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending() or self._closing)
                if self._abandoned or not self._pending():
                    return
                while self._waiting and len(self._sending) < BATCH:
                    self._sending.append(self._waiting.popleft())
            try:
                self._send()
                wait = FIRST_WAIT_S
            except Exception as error:
                self._warn(error)
                if backend.is_final(error):
                    self._give_up()
                    continue
                self._rest(wait)
                wait = min(2 * wait, LONGEST_WAIT_S)

    def _rest(self, wait: float) -> None:
        """Wait before another attempt; `close` calls for one at once, and for a quicker pace after it."""
        with self._changed:
            if self._closing:
                self._changed.wait_for(lambda: self._abandoned, FIRST_WAIT_S)
            else:
                self._changed.wait_for(lambda: self._closing, wait)

    def _send(self) -> None:
        """One request: the oldest values. Raises what MLflow raises; they stay then."""
        client = backend.client(self._uri)
        if self._last is None:
            found = client.get_run(self._run_id).data.to_proto().metrics  # the latest of each metric, by step
            self._last = {m.key: int(m.step) for m in found}
        last, fresh = dict(self._last), []
        for name, value, time_ms, step in self._sending:
            if step > last.get(name, -1):
                last[name] = step
                fresh.append(backend.metric(name, value, time_ms, step))
        if fresh:
            client.log_batch(self._run_id, metrics=fresh)
        self._last = last
        with self._changed:
            self._sending.clear()
            self._changed.notify_all()

    def _give_up(self) -> None:
        """Lose what the store refused for good, and go on with the rest."""
        with self._changed:
            self._lost += len(self._sending)
            self._sending.clear()
            self._changed.notify_all()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("MLflow at %s does not take metrics of run %s (%s); training goes on, they are kept and tried "
                         "again", backend.safe_uri(self._uri), self._run_id, backend.reason(error))
