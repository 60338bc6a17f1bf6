"""Metrics from rank 0 to MLflow without ever holding up the training run.

`MetricLogger.log` puts values into a bounded buffer in memory; a daemon thread sends them in order. A store that is
slow or away makes the buffer grow. What would be lost with it goes into the run's spool (`vswin_dist/tracking/spool.py`);
where there is none the oldest values are lost, which are counted. A batch is repeated with the timestamps that it had, which
the store recognises, and after the store was asked how far it is, so that a request answered too late does not double its
values.
"""

from __future__ import annotations

import collections
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence

from vswin_dist.errors import FencedOut, StorageError, TrackingError
from vswin_dist.tracking import backend
from vswin_dist.tracking.spool import Spool

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
    """Sends metrics of the run `run_id`; one for each, on rank 0.

    Steps never repeat: of each metric, steps at or below the last one that the store holds are skipped, so a run
    that goes back to its checkpoint after a restart continues each curve where it had ended. What is in the spool, of this
    process or an earlier one, is sent before.
    """

    def __init__(self, uri: str, run_id: str, capacity: int = CAPACITY, spool: Spool | None = None) -> None:
        self._uri, self._run_id, self._capacity, self._spool = uri, run_id, capacity, spool
        self._waiting: collections.deque[Row] = collections.deque()
        self._sending: list[Row] = []  # taken from `_waiting`, not yet acknowledged
        self._last: dict[str, int] | None = None  # metric -> last step in the store or sent; None: not yet asked
        self._copied = 0  # so many of those, the first, are in the spool, too
        self._lost = 0
        self._failing = False  # whether the last request failed
        self._spooled = spool is not None  # whether there may be something in the spool
        self._changed = threading.Condition()
        self._closing = self._abandoned = self._warned = False
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take `values` of global step `step`; returns at once.

        Raises:
            ValueError: a name that MLflow does not allow (letters, digits and `_-. /:`), or a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        if bad := [n for n in values if not _NAME.match(n)]:
            raise ValueError(f"metric name {bad[0]!r}: only letters, digits and _-. /: are allowed")
        now = int(time.time() * 1000)
        with self._changed:
            if self._abandoned:
                return
            self._waiting.extend((name, float(value), now, step) for name, value in values.items())
            while len(self._waiting) > self._capacity:
                self._waiting.popleft()
                self._lost += 1
            self._changed.notify_all()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until the store has everything; False where `timeout_s` passed before."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending() or not self._thread.is_alive(), timeout_s)

    def keep(self, timeout_s: float = 30.0) -> bool:
        """Wait until the store has everything; what it has not after `timeout_s`, or is away for, goes into the spool."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending() or self._failing or not self._thread.is_alive(), timeout_s)
            if not self._pending():
                return True
        self._set_aside()
        return False

    def close(self, timeout_s: float = 30.0) -> int:
        """Send what waits, for at most `timeout_s`, and stop; returns the number of values that were lost.

        With a spool, a store that does not take the next request is waited for no longer.
        """
        with self._changed:
            self._closing = True
            self._failing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending() or (self._failing and self._spool is not None), timeout_s)
            done = not self._pending()
        if done:
            self._thread.join()
        kept = self._set_aside()
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            lost = self._lost + len(self._waiting) + (0 if kept else len(self._sending))
        if lost:
            _log.warning(
                "MLflow at %s: %d metric values of run %s were not taken and are lost",
                backend.safe_uri(self._uri),
                lost,
                self._run_id,
            )
        return lost

    def _set_aside(self) -> bool:
        """Put into the spool what the store has not confirmed; False where there is none, or the storage is away, too."""
        with self._changed:
            sending, count, taken = self._sending, len(self._sending), list(self._waiting)
            rows = [*sending[self._copied :], *taken]  # those under way may still be confirmed
            self._waiting.clear()
        if not rows:
            return True
        try:
            if self._spool:
                self._spool.put("metrics", {"rows": rows})
                self._spooled = True
                with self._changed:
                    if self._sending is sending:
                        self._copied = count
                return True
        except FencedOut:
            return True  # the steps are done again by who took over
        except StorageError as error:
            _log.warning("%d metric values of run %s stay in memory: %s", len(rows), self._run_id, error)
        with self._changed:
            self._waiting.extendleft(reversed(taken))
        return False

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
                self._send_all()
                wait = FIRST_WAIT_S
            except FencedOut as error:
                self._stop(error)
                return
            except Exception as error:
                self._failed(error)
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

    def _send_all(self) -> None:
        """Send what is in the spool, then the oldest values that wait; they stay where MLflow or storage raises."""
        if self._spool:
            self._spool.fence.check()
            if self._spooled:
                self._send_spooled(self._spool)
        self._send()
        with self._changed:
            self._failing = False

    def _send_spooled(self, spool: Spool) -> None:
        self._spooled = False  # first: more may come meanwhile
        try:
            send_spooled(self._uri, self._run_id, spool)
        except Exception as error:
            if not (backend.is_final(error) or isinstance(error, TrackingError)):
                self._spooled = True
                raise
            self._warn(error)  # it stays for people to look at, and holds up nothing else
        self._last = None

    def _send(self) -> None:
        """One request: the oldest values."""
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
        self._done_with_sending()

    def _give_up(self) -> None:
        """Lose what the store refused for good, and continue with the rest."""
        with self._changed:
            self._lost += len(self._sending)
        self._done_with_sending()

    def _done_with_sending(self) -> None:
        with self._changed:
            self._sending, self._copied = [], 0
            self._changed.notify_all()

    def _stop(self, error: FencedOut) -> None:
        """Tell the store nothing more: the steps are done again by who took over."""
        _log.warning("metrics of run %s are not sent any more: %s", self._run_id, error)
        with self._changed:
            self._abandoned = True
            self._waiting.clear()
        self._done_with_sending()

    def _failed(self, error: Exception) -> None:
        """Note a failure; the store is asked anew what it has, and what waits in great numbers goes into the spool."""
        self._warn(error)
        self._last = None
        with self._changed:
            self._failing = True
            self._changed.notify_all()
            many = len(self._waiting) > self._capacity // 2
        if many and self._spool:
            self._set_aside()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "MLflow at %s does not take metrics of run %s (%s); the run continues, they are kept and retried",
                backend.safe_uri(self._uri),
                self._run_id,
                backend.reason(error),
            )


def send_spooled(uri: str, run_id: str, spool: Spool) -> int:
    """Send the metrics in `spool` that the store has not, and remove them there; returns how many were sent.

    The store is asked for the steps of each metric, since nobody knows which requests it took before it was away.

    Raises:
        StorageError, TrackingError: the spool cannot be read. What MLflow raises; they stay then.
    """
    entries = list(spool.entries("metrics"))
    rows: list[Row] = [tuple(row) for _, body in entries for row in body["rows"]]
    sent = send_missing(uri, run_id, rows)
    for name, _ in entries:
        spool.remove(name)
    return sent


def send_missing(uri: str, run_id: str, rows: Sequence[Row]) -> int:
    """Send those of `rows` whose step the store has not, of each metric; returns how many these are."""
    client = backend.client(uri)
    have = {name: {m.step for m in client.get_metric_history(run_id, name)} for name in {row[0] for row in rows}}
    fresh = []
    for name, value, time_ms, step in rows:
        if step not in have[name]:
            have[name].add(step)
            fresh.append(backend.metric(name, value, time_ms, step))
    for first in range(0, len(fresh), BATCH):
        client.log_batch(run_id, metrics=fresh[first : first + BATCH])
    return len(fresh)
