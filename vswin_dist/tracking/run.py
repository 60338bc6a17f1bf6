"""The run of a training, an evaluation or a comparison: what is logged of it, wherever that goes.

The driver opens the run (`open_run`), writes what is known before the first step (`Run.start`) and sets the end state
(`Run.end`). It hands `Run.reference` to the ranks, of which the main one attaches to the run and logs metrics.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from vswin_dist import local_files
from vswin_dist.errors import TrackingError
from vswin_dist.lease import UNFENCED, Fence
from vswin_dist.tracking import backend
from vswin_dist.tracking.names import Names
from vswin_dist.tracking.spool import Spool

NONE = "none"  # as a tracking URI: nothing is tracked
UNTRACKED = "untracked-"  # how the ids of runs begin that no store knows
FLUSH_S = 30.0
PATIENCE_S, ASKED_AGAIN_S = 120.0, 2.0  # with a store that is away when work of hours is done
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset as a run names it: the manifest's name and fingerprint, its URL, and what it is used for."""

    name: str
    fingerprint: str
    url: str
    context: Literal["training", "validation", "test"]
    profile: Mapping[str, Any] = field(default_factory=dict)  # such as the manifest's counts


@dataclass(frozen=True)
class RunReference:
    """A run by plain values, which another process attaches to."""

    uri: str  # of the store
    run_id: str
    spool: str = ""  # URL of the folder for what the store does not take; "" where that is an error, or lost
    fence: Fence = UNFENCED  # who is fenced out tells the store nothing more


class Run(ABC):
    """A run that was opened or attached to. A subclass for each kind of store, chosen by `kind`."""

    registers: ClassVar[bool] = False  # whether such a store has a registry of models

    @classmethod
    @abstractmethod
    def create(cls, uri: str, experiment: str, name: str) -> Run:
        """Create a run; see `open_run`."""

    @classmethod
    @abstractmethod
    def reopen(cls, uri: str, run_id: str) -> Run:
        """Reopen a run; see `open_run`."""

    @classmethod
    @abstractmethod
    def check(cls, uri: str, names: Names, make: bool) -> None:
        """Refuse a store that cannot be used; see `check_store`."""

    def __init__(self, reference: RunReference) -> None:
        self.reference = reference
        uri = backend.safe_uri(reference.uri)
        self.spool = Spool(reference.spool, uri, reference.run_id, reference.fence) if reference.spool else None
        self.listeners: list[Callable[[Mapping[str, float]], None]] = []  # each is told of what is logged

    @property
    def id(self) -> str:
        """The run's id in its store."""
        return self.reference.run_id

    @abstractmethod
    def start(
        self,
        *,
        settings: Any,
        recipe: str | None,
        source: str,
        world_size: int,
        datasets: Sequence[DatasetRecord],
        files: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> int:
        """Log what is known before the first step; of a resumed run, what is new or differs.

        Args:
            settings: a dataclass or mapping, flattened to params.
            defaults: of settings; those that have the same value are no params, so that runs differ where they do.
            recipe: its text, where there is one.
            source: see `source_version`.
            files: more artifacts, path -> text, such as `parameter_groups.md`.

        Returns:
            How often the run had been started before: 0 the first time, and where that is kept for later.

        Raises:
            TrackingError: the store is away, and the run has no spool.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take `metrics` of global step `step`, to be sent in the background; returns at once.

        Raises:
            ValueError: a name that stores do not take (letters, digits and `_-. /:`), or a negative step.
        """
        for tell in self.listeners:
            tell(metrics)
        self.take(step, metrics)

    @abstractmethod
    def take(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do what `log` says, for this kind of store."""

    @abstractmethod
    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until the store has all metrics; False where `timeout_s` passed before."""

    @abstractmethod
    def keep(self, timeout_s: float = FLUSH_S) -> bool:
        """Let no metric taken so far depend on this process: the store has it within `timeout_s`, else the spool.

        Returns:
            True where the store has all. It is not waited for where it is known to be away.
        """

    @abstractmethod
    def artifact(self, path: str, text: str) -> None:
        """Keep `text` as the run's file `path`, redacted.

        Raises:
            TrackingError: the store is away, and the run has no spool.
        """

    @abstractmethod
    def artifact_file(self, path: str, local: Path) -> None:
        """Keep a copy of the file `local` as the run's file `path`.

        Raises:
            TrackingError: the store is away.
        """

    @abstractmethod
    def end(self, status: Status) -> bool:
        """Set the end state; False, with a warning, where the store is away: the work's own result stands.

        A process that is fenced out leaves the state to the one that took over.
        """

    @abstractmethod
    def close(self, timeout_s: float = FLUSH_S) -> int:
        """Send the metrics that wait, for at most `timeout_s`, and stop; returns the number of values that were lost.

        What a run with a spool could not send is there, and not lost.
        """


class NullRun(Run):
    """A run of which nothing is kept: of `tracking.uri=none`, of ranks other than the main one, of tests."""

    def __init__(self, reference: RunReference | None = None) -> None:
        super().__init__(reference or RunReference(NONE, f"{UNTRACKED}{uuid.uuid4().hex}"))

    @classmethod
    def create(cls, uri: str, experiment: str, name: str) -> Run:
        return cls()

    @classmethod
    def reopen(cls, uri: str, run_id: str) -> Run:
        return cls(RunReference(uri, run_id))

    @classmethod
    def check(cls, uri: str, names: Names, make: bool) -> None:
        pass

    def start(self, **_: Any) -> int:
        return 0

    def take(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        return True

    def keep(self, timeout_s: float = FLUSH_S) -> bool:
        return True

    def artifact(self, path: str, text: str) -> None:
        pass

    def artifact_file(self, path: str, local: Path) -> None:
        pass

    def end(self, status: Status) -> bool:
        return True

    def close(self, timeout_s: float = FLUSH_S) -> int:
        return 0


def kind(uri: str) -> type[Run]:
    """Choose the class of the runs in the store at `uri`; the only place that knows all of them."""
    if uri == NONE:
        return NullRun
    from vswin_dist.tracking.mlflow_run import MlflowRun

    return MlflowRun


def open_run(uri: str, experiment: str, name: str, run_id: str | None = None) -> Run:
    """Create the run `name` in the store `uri`, or with `run_id` reopen that one, whose state becomes RUNNING.

    Raises:
        CheckpointError: the run `run_id` is absent from the store, or was deleted.
        TrackingError: the store is away.
        ConfigError: the experiment cannot be used.
    """
    return kind(uri).reopen(uri, run_id) if run_id else kind(uri).create(uri, experiment, name)


def attach(reference: RunReference) -> Run:
    """Attach to a run that another process has opened, to log its metrics."""
    return kind(reference.uri)(reference)


def below(parent: str | None) -> dict[str, str]:
    """Give the tag of a run that is shown below the run `parent`; none for None."""
    return {backend.PARENT_TAG: parent} if parent else {}


def tracking_uri(setting: str | None) -> str:
    """Choose the store: `setting`, else `MLFLOW_TRACKING_URI`, else a sqlite file in the data root; `none` for no store.

    A sqlite path is made absolute, since a submitted job works in another folder.
    """
    uri = setting or os.environ.get("MLFLOW_TRACKING_URI") or f"{backend.SQLITE}{local_files.home()}/mlflow/mlflow.db"
    if not uri.startswith(backend.SQLITE):
        return uri
    path, mark, query = uri.removeprefix(backend.SQLITE).partition("?")
    return f"{backend.SQLITE}{local_files.expanded(path)}{mark}{query}"


def check_store(uri: str, names: Names | None = None, make: bool = False) -> None:
    """Refuse a store that cannot be used, or not for `names`.

    Args:
        make: the experiment is made where it is absent. Else nothing is written: of a sqlite file that is not there
            yet, the folder is tried.

    Raises:
        TrackingError: the store is away or refuses.
        StorageError: the folder cannot be written.
        ConfigError: a name cannot be used. CheckpointError: the run cannot be reopened.
    """
    kind(uri).check(uri, names or Names(), make)


def wait_for_store(uri: str) -> None:
    """Wait for a store that is away now, for at most `PATIENCE_S`: for what is done, and only to be told to it.

    Raises:
        TrackingError: it is still away, or refuses.
    """
    end, told = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            return check_store(uri)
        except TrackingError as error:
            if not error.retriable or time.monotonic() > end:
                raise
            if not told:
                print(f"warning: {error} It is asked again for {PATIENCE_S:g} s.", file=sys.stderr, flush=True)
            told = True
        time.sleep(ASKED_AGAIN_S)
