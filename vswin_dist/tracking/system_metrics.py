"""Use of each node's CPUs, memory, disk, network and GPUs in the course of a run: MLflow's own monitors, one for each node.

Metrics are `system/NODE/...`, as MLflow names those of several nodes, at the training step in which they were taken.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from vswin_dist.device import Rank
from vswin_dist.tracking import backend
from vswin_dist.tracking.run import NONE, NullRun, Run, RunReference, attach

SAMPLE_EVERY_S = 10.0
LOG_EVERY = 3  # samples, of which the mean is logged
CLOSE_S = 5.0


@contextmanager
def system_metrics(tracking: Run, reference: RunReference, rank: Rank, step: Callable[[], int]) -> Iterator[None]:
    """Log this node's use while the block runs, from one of the ranks on it. Collective.

    Args:
        tracking: the run as the main rank has it; others attach to it by `reference`.
        step: returns the step in hand.
    """
    node = socket.gethostname()
    if rank.gather(node).index(node) != rank.rank or reference.uri == NONE:
        yield
        return
    # What a store that is away has missed is sent by one rank: others keep nothing in the spool.
    run = tracking if not isinstance(tracking, NullRun) else attach(replace(reference, spool=""))
    sampler = Sampler(run, node, step)
    try:
        yield
    finally:
        sampler.close()
        if run is not tracking:
            run.close()


class Sampler:
    """A thread that samples this machine and logs the means; a step has one value at most of each metric."""

    def __init__(self, run: Run, node: str, step: Callable[[], int]) -> None:
        self._run, self._step = run, step
        self._prefix = "system/" + re.sub(r"[^\w.-]", "_", node) + "/"
        self._logged = 0  # the last step
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Log what was sampled last, and stop."""
        self._closing.set()
        self._thread.join(CLOSE_S)

    def _work(self) -> None:
        monitors, samples, closing = backend.system_monitors(), 0, False  # MLflow's import takes seconds
        while monitors and not closing:
            for monitor in monitors:
                monitor.collect_metrics()
            samples += 1
            closing = self._closing.wait(SAMPLE_EVERY_S)
            step = self._step()
            if step > self._logged and (samples >= LOG_EVERY or closing):
                found = {k: v for monitor in monitors for k, v in monitor.aggregate_metrics().items()}
                self._run.log(step, {self._prefix + name: value for name, value in found.items()})
                for monitor in monitors:
                    monitor.clear_metrics()
                samples, self._logged = 0, step
