"""Train the rows of an ablation, each by a driver of its own, as many at a time as the cluster has room for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Protocol

from vswin_dist import cluster
from vswin_dist.cluster import Resources
from vswin_dist.errors import ConfigError, after_start
from vswin_dist.manifest import read_manifest
from vswin_dist.training import paper
from vswin_dist.training.dry_run import resources_of
from vswin_dist.training.halving import Halving
from vswin_dist.training.paper import Trial
from vswin_dist.training.preflight import preflight


class Schedule(Protocol):
    """Which row trains next, asked by several threads."""

    def take(self) -> Trial | None:
        """Return the next row; None: there is none any more."""

    def give(self, trial: Trial, failed: bool) -> None:
        """Say that a row which was taken has ended."""

    def stop(self) -> None:
        """Let no further row be taken."""


class InOrder:
    """One row after the other, to its end."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._waiting = deque(trials)

    def take(self) -> Trial | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def give(self, trial: Trial, failed: bool) -> None:
        pass

    def stop(self) -> None:
        self._waiting.clear()


class Rows:
    """The drivers of rows: `python JOB --recipe RECIPE key=value ...`.

    Args:
        job: the script that trains.
        parent: id of the tracking run that theirs are shown below.
    """

    def __init__(self, job: Path, parent: str) -> None:
        self.job, self.parent = job, parent
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._lock, self._stopping = Lock(), Event()

    def train(self, schedule: Schedule, waiting: Sequence[Resources], at_once: int | None = None) -> list[str]:
        """Train what `schedule` gives to its end; returns the labels of those that failed.

        Where this is interrupted, those that train are told to stop, and awaited: each saves a checkpoint.

        Args:
            waiting: what each of the rows needs.
            at_once: so many at a time; None: as many of the largest as an idle cluster has room for.
        """
        if not waiting:
            return []
        with cluster.joined():
            most = min(at_once or min(map(cluster.room, waiting)), len(waiting))
            print(f"{len(waiting)} rows to train, {most} at a time", flush=True)
            return self.train_at(cluster.address(), schedule, most)

    def train_at(self, address: str, schedule: Schedule, most: int) -> list[str]:
        """Train on the cluster at `address`; see `train`."""
        failed: list[str] = []

        def work() -> None:
            try:
                while trial := schedule.take():
                    code = self._train(trial, address)
                    if code:
                        failed.append(trial.label)
                    schedule.give(trial, bool(code))
            except BaseException:
                schedule.stop()  # else another thread may wait for this row for ever
                raise

        with ThreadPoolExecutor(most) as pool:
            try:
                for done in [pool.submit(work) for _ in range(most)]:
                    done.result()
            except BaseException:
                schedule.stop()
                self._stop()
                raise
        return sorted(failed)

    def _train(self, trial: Trial, address: str) -> int:
        """Train one row, its output shown with its label before each line; returns the exit code."""
        below = [f"tracking.parent={self.parent}"] if self.parent else []
        command = [sys.executable, str(self.job), "--recipe", trial.recipe, *trial.overrides, *below]
        with self._lock:
            if self._stopping.is_set():
                return 1
            process = self._running[trial.label] = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "RAY_ADDRESS": address},
                start_new_session=True,  # a terminal's Ctrl-C is for this process, which tells them once
            )
        assert process.stdout
        for line in process.stdout:
            print(f"{trial.label} | {line}", end="", flush=True)
        return process.wait()

    def _stop(self) -> None:
        with self._lock:
            self._stopping.set()
            for process in self._running.values():
                if process.poll() is None:
                    process.terminate()


def complete(trials: Sequence[Trial], job: Path, at_once: int | None, halved: tuple[int, int] | None = None) -> list[str]:
    """Train what is left of a table, print all of it and log it; returns the labels of the rows that failed.

    Args:
        at_once: see `Rows.train`.
        halved: (eta, rungs) of successive halving; None: each row is trained to its end.

    Raises:
        ConfigError: there is no validation set to compare by, or what `preflight` refuses.
    """
    if not all(t.settings.data.val for t in trials):
        raise ConfigError("data.val is not set: an ablation compares scores of a validation set")
    paper.check_tracking(trials)
    specs = {t.label: preflight(t.settings) for t in trials if not t.is_finished()}  # all are checked before one is trained
    schedule: Halving | InOrder = InOrder(t for t in trials if t.label in specs)
    if halved:
        schedule = Halving(trials, [specs[t.label].last_step if t.label in specs else None for t in trials], *halved)
    with (
        after_start("Once that is mended, the same command completes the table."),
        paper.parent(trials) as (parent, earlier),
    ):
        failed = Rows(job, parent.id).train(schedule, [resources_of(spec) for spec in specs.values()], at_once)
        text = paper.comparison(trials, len(read_manifest(trials[0].settings.data.train).classes))
        if isinstance(schedule, Halving):
            text += f"\n\n{schedule.table()}"
        print(text, flush=True)
        paper.log(parent, earlier, trials, text)
    return failed
