"""A run in MLflow: one for one training, whatever restarts happen in it."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from vswin_dist import storage
from vswin_dist.errors import CheckpointError, FencedOut, StorageError, TrackingError
from vswin_dist.tracking import backend
from vswin_dist.tracking.metrics import MetricLogger
from vswin_dist.tracking.names import Names
from vswin_dist.tracking.provenance import flatten, package_versions, redact
from vswin_dist.tracking.run import FLUSH_S, NONE, UNTRACKED, DatasetRecord, Run, RunReference, Status
from vswin_dist.tracking.spool import WORDS, Kind

MAX_PARAM = 6000  # characters; MLflow refuses longer values
MAX_TAG = 8000
STARTS_TAG = "vswin.starts"  # how often this run was submitted
START_TAG = "vswin.start"  # the last of these, by an id of its own
_log = logging.getLogger(__name__)


class MlflowRun(Run):
    """A run of the store at `reference.uri`; its metrics are sent by a thread that the first of them starts."""

    registers = True

    def __init__(self, reference: RunReference) -> None:
        super().__init__(reference)
        self._logger: MetricLogger | None = None

    @classmethod
    def create(cls, uri: str, experiment: str, name: str) -> MlflowRun:
        """Create the run `name`; see `open_run`."""
        tags = {"mlflow.source.type": "JOB", "mlflow.source.name": "vswin_dist", "mlflow.user": _user()}
        with backend.reachable(uri):
            made = backend.client(uri).create_run(backend.experiment_id(uri, experiment), run_name=name, tags=tags)
        return cls(RunReference(uri, str(made.info.run_id)))

    @classmethod
    def reopen(cls, uri: str, run_id: str) -> MlflowRun:
        """Reopen the run `run_id`; see `open_run`."""
        with backend.reachable(uri):
            _check_run(uri, run_id)
            backend.client(uri).update_run(run_id, status="RUNNING")
        return cls(RunReference(uri, run_id))

    @classmethod
    def check(cls, uri: str, names: Names, make: bool) -> None:
        """Ask the store for what will be used. A sqlite file that is not there yet is not made: its folder is tried."""
        backend.check_names(uri, names)
        path = Path(uri.removeprefix(backend.SQLITE).partition("?")[0])
        if uri.startswith(backend.SQLITE) and not path.exists() and not make:
            if names.run_id is not None:
                raise _no_run(uri, names.run_id)
            storage.check_writable(str(path.parent))
            return
        with backend.reachable(uri):
            backend.client(uri).search_experiments(max_results=1)
            if names.experiment is not None:
                if make:
                    backend.check_right(uri, backend.experiment_id(uri, names.experiment))
                else:
                    backend.find_experiment(uri, names.experiment)
            if names.run_id is not None:
                _check_run(uri, names.run_id)
            if names.model is not None:
                backend.check_model(uri, names.model)

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
        """Log what is known before the first step; see `Run.start`.

        Params cannot be changed in MLflow: on resumption N the settings that differ stand in the tag `resumed.N` and
        the files below `resumed_N/`. Everything is redacted first.
        """
        machine = {"platform": platform.platform(), "packages": package_versions()}
        texts = {"environment.json": json.dumps(machine, indent=1), **(files or {})}
        if recipe is not None:
            texts["recipe.yaml"] = recipe
        start = {
            "id": uuid.uuid4().hex,
            "params": {k: _shorten(v, MAX_PARAM) for k, v in flatten(settings).items()},
            "defaults": {k: _shorten(v, MAX_PARAM) for k, v in flatten(defaults or {}).items()},
            "tags": {
                "source_commit": source,
                "mlflow.source.git.commit": source,
                "world_size": str(world_size),
                **{f"dataset.{d.context}": d.fingerprint for d in datasets},
                **{k: redact(v) for k, v in (tags or {}).items()},
            },
            "datasets": [{**asdict(d), "url": redact(d.url)} for d in datasets],
            "files": {path: redact(text) for path, text in texts.items()},
        }
        try:
            return self.send_start(start)
        except TrackingError as error:
            self._keep("start", start, error)
            return 0

    def send_start(self, start: Mapping[str, Any]) -> int:
        """Send what `start` has gathered; once more after a failure changes nothing that was taken.

        Raises:
            TrackingError: the store is away.
        """
        uri, run_id = self.reference.uri, self.id
        with backend.reachable(uri):
            run = backend.client(uri).get_run(run_id).data
            number = int(run.tags.get(STARTS_TAG, "0"))
            if run.tags.get(START_TAG) == start["id"]:  # half of it was taken before
                number -= 1
            params, usual = start["params"], start.get("defaults", {})  # of which earlier versions kept none
            # What is no param has its default: at the first start as it is, later as it was.
            mine = {k: v for k, v in params.items() if k not in usual or (number == 0 and v != usual[k])}
            new = {k: v for k, v in mine.items() if k not in run.params}
            changed = {k: v for k, v in params.items() if number and run.params.get(k, usual.get(k, v)) != v}
            marks = {STARTS_TAG: str(number + 1), START_TAG: start["id"], **start["tags"]}
            if changed:
                marks[f"resumed.{number}"] = json.dumps(changed)
            backend.set_values(uri, run_id, new, {k: _shorten(v, MAX_TAG) for k, v in marks.items()})
            for d in (DatasetRecord(**values) for values in start["datasets"]):
                backend.log_dataset(uri, run_id, d.name, d.fingerprint, d.url, d.context, d.profile)
        folder = f"resumed_{number}/" if number else ""
        for path, text in start["files"].items():
            self.send_artifact(folder + path, text)
        return number

    def take(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._logger is None:
            self._logger = MetricLogger(self.reference.uri, self.id, spool=self.spool)
        self._logger.log(step, metrics)

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        return self._logger is None or self._logger.flush(timeout_s)

    def keep(self, timeout_s: float = FLUSH_S) -> bool:
        return self._logger is None or self._logger.keep(timeout_s)

    def artifact(self, path: str, text: str) -> None:
        text = redact(text)
        try:
            self.send_artifact(path, text)
        except TrackingError as error:
            self._keep("artifact", {"path": path, "text": text}, error)

    def send_artifact(self, path: str, text: str) -> None:
        """Send a file of the run, or raise TrackingError."""
        with backend.stores_files(self.reference.uri):
            backend.client(self.reference.uri).log_text(self.id, text, path)

    def artifact_file(self, path: str, local: Path) -> None:
        uri, folder = self.reference.uri, PurePosixPath(path).parent
        with backend.stores_files(uri), backend.long_requests():
            backend.client(uri).log_artifact(self.id, str(local), str(folder) if folder.name else None)

    def end(self, status: Status) -> bool:
        time_ms = int(time.time() * 1000)
        try:
            self.reference.fence.check()
            self.send_end(status, time_ms)
        except FencedOut:
            return False
        except Exception as error:
            _log.warning(
                "MLflow at %s did not take the end state %s of run %s: %s",
                backend.safe_uri(self.reference.uri),
                status,
                self.id,
                backend.reason(error),
            )
            if self.spool:
                with contextlib.suppress(FencedOut, StorageError):
                    self.spool.put("end", {"status": status, "time_ms": time_ms})
            return False
        return True

    def send_end(self, status: Status, time_ms: int) -> None:
        """Send the end state, or raise what MLflow raises."""
        backend.client(self.reference.uri).set_terminated(self.id, status=status, end_time=time_ms)

    def _keep(self, kind: Kind, body: dict[str, Any], error: TrackingError) -> None:
        """Put into the spool what the store did not take for `error`; without a spool, or where it refuses, raise it."""
        if self.spool is None or not error.retriable:
            raise error
        self.spool.put(kind, body)
        _log.warning("%s The run goes on: %s kept in %s", error, WORDS[kind], self.spool.url)

    def close(self, timeout_s: float = FLUSH_S) -> int:
        return 0 if self._logger is None else self._logger.close(timeout_s)


def _check_run(uri: str, run_id: str) -> None:
    """Refuse a run that cannot be reopened; see `open_run`."""
    if run_id.startswith(UNTRACKED):
        raise _no_run(uri, run_id)
    client = backend.client(uri)
    try:
        found = client.get_run(run_id).info
    except Exception as error:
        if not backend.is_final(error):
            raise
        raise _no_run(uri, run_id) from error
    if found.lifecycle_stage != "deleted":
        return
    restore = f"runs restore --run-id {run_id}"
    if client.get_experiment(found.experiment_id).lifecycle_stage == "deleted":  # which deletes its runs
        restore = f"experiments restore -x {found.experiment_id}"
    raise CheckpointError(
        f"the MLflow run {run_id} was deleted from {backend.safe_uri(uri)}: restore it with "
        f"`mlflow {restore}`, or start over with run.fresh=true"
    )


def _no_run(uri: str, run_id: str) -> CheckpointError:
    where = backend.safe_uri(uri)
    if run_id.startswith(UNTRACKED):
        return CheckpointError(
            f"this run was begun with tracking.uri={NONE}, so that {where} does not know it: "
            f"resume with tracking.uri={NONE}, or start over with run.fresh=true"
        )
    return CheckpointError(
        f"the MLflow run {run_id} is not in {where}: name the store where it began in tracking.uri, "
        "or start over with run.fresh=true"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user id without a name
        return "unknown"


def _shorten(value: str, limit: int) -> str:
    return value if len(value) <= limit else f"{value[: limit - 20]}… ({len(value)} chars)"[:limit]
