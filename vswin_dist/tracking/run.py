"""One MLflow run for one training, whatever restarts happen in it.

The driver opens the run (`open_run`), writes what is known before the first step (`log_start`) and sets the end
state (`end_run`); rank 0 alone logs metrics meanwhile, through `metrics.MetricLogger`.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vswin_dist import storage
from vswin_dist.errors import CheckpointError
from vswin_dist.tracking import backend
from vswin_dist.tracking.provenance import flatten, package_versions, redact

MAX_PARAM = 6000  # characters; MLflow refuses longer values
MAX_TAG = 8000
STARTS_TAG = "vswin.starts"  # how often this training was submitted
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset as a run names it: the manifest's name and fingerprint, its URL, and what it is used for."""

    name: str
    fingerprint: str
    url: str
    context: Literal["training", "validation", "test"]
    profile: Mapping[str, Any] = field(default_factory=dict)  # such as the manifest's counts


def tracking_uri(setting: str | None) -> str:
    """The store to use: `setting`, else ``MLFLOW_TRACKING_URI``, else a sqlite file in the data root.

    A sqlite path is made absolute, since a submitted job works in another folder.
    """
    uri = setting or os.environ.get("MLFLOW_TRACKING_URI") or f"{backend.SQLITE}{storage.home()}/mlflow/mlflow.db"
    if not uri.startswith(backend.SQLITE):
        return uri
    path, mark, query = uri.removeprefix(backend.SQLITE).partition("?")
    return f"{backend.SQLITE}{Path(path).expanduser().absolute()}{mark}{query}"


def check_store(uri: str) -> None:
    """Ask the store at `uri` something. A sqlite file that is not there yet is not made: its folder is tried.

    Raises:
        PreflightError: the store cannot be reached. DataError: the folder cannot be written.
    """
    path = Path(uri.removeprefix(backend.SQLITE).partition("?")[0])
    if uri.startswith(backend.SQLITE) and not path.exists():
        storage.check_writable(str(path.parent))
        return
    with backend.reachable(uri):
        backend.client(uri).search_experiments(max_results=1)


def open_run(uri: str, experiment: str, run_name: str, run_id: str | None = None) -> str:
    """Create the run of a training, or with `run_id` open that one again (its state is RUNNING afterwards).

    Raises:
        CheckpointError: the run `run_id` is absent from the store, or was deleted.
        PreflightError: the store cannot be reached. ConfigError: the experiment cannot be used.
    """
    with backend.reachable(uri):
        client = backend.client(uri)
        if run_id is None:
            tags = {"mlflow.source.type": "JOB", "mlflow.source.name": "vswin_dist", "mlflow.user": _user()}
            run = client.create_run(backend.experiment_id(uri, experiment), run_name=run_name, tags=tags)
            return str(run.info.run_id)
        where = backend.safe_uri(uri)
        try:
            run = client.get_run(run_id)
        except Exception as error:
            if not backend.is_final(error):
                raise
            raise CheckpointError(f"the MLflow run {run_id} of this training is not in {where}: name the store where "
                                  "it began in tracking.uri, or start over with run.fresh=true") from error
        if run.info.lifecycle_stage == "deleted":
            raise CheckpointError(f"the MLflow run {run_id} of this training was deleted from {where}: restore it with "
                                  f"`mlflow runs restore --run-id {run_id}`, or start over with run.fresh=true")
        client.update_run(run_id, status="RUNNING")
        return run_id


def log_start(uri: str, run_id: str, *, settings: Any, recipe: str | None, source: str, world_size: int,
              datasets: Sequence[DatasetRecord], files: Mapping[str, str] | None = None,
              tags: Mapping[str, str] | None = None) -> int:
    """Write what is known before the first step; on a resumed run, what is new or differs.

    Params cannot be changed in MLflow: on resumption N the settings that differ stand in the tag ``resumed.N`` and the
    files below ``resumed_N/``. Everything is redacted first.

    Args:
        settings: a dataclass or mapping, flattened to params.
        recipe: its text, where there is one.
        source: see `source_version`.
        files: more artifacts, path -> text, such as ``parameter_groups.md``.

    Returns:
        How often the training had been started before: 0 the first time.
    """
    with backend.reachable(uri):
        run = backend.client(uri).get_run(run_id).data
        number = int(run.tags.get(STARTS_TAG, "0"))
        wanted = {k: _shorten(v, MAX_PARAM) for k, v in flatten(settings).items()}
        new = {k: v for k, v in wanted.items() if k not in run.params}
        changed = {k: v for k, v in wanted.items() if run.params.get(k, v) != v}
        marks = {STARTS_TAG: str(number + 1), "source_commit": source, "mlflow.source.git.commit": source,
                 "world_size": str(world_size), **{f"dataset.{d.context}": d.fingerprint for d in datasets},
                 **{k: redact(v) for k, v in (tags or {}).items()}}
        if changed:
            marks[f"resumed.{number}"] = json.dumps(changed)
        backend.set_values(uri, run_id, new, {k: _shorten(v, MAX_TAG) for k, v in marks.items()})
        for d in datasets:
            backend.log_dataset(uri, run_id, d.name, d.fingerprint, redact(d.url), d.context, d.profile)
        folder = f"resumed_{number}/" if number else ""
        machine = {"platform": platform.platform(), "packages": package_versions()}
        texts = {"environment.json": json.dumps(machine, indent=1), **(files or {})}
        if recipe is not None:
            texts["recipe.yaml"] = recipe
        for path, text in texts.items():
            backend.client(uri).log_text(run_id, redact(text), folder + path)
    return number


def end_run(uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> bool:
    """Set the end state; False, with a warning, where the store is away: the training's own result stands."""
    try:
        backend.client(uri).set_terminated(run_id, status=status, end_time=int(time.time() * 1000))
    except Exception as error:
        _log.warning("MLflow at %s did not take the end state %s of run %s: %s", backend.safe_uri(uri), status, run_id,
                     backend.reason(error))
        return False
    return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user id without a name
        return "unknown"


def _shorten(value: str, limit: int) -> str:
    return value if len(value) <= limit else f"{value[:limit - 20]}… ({len(value)} chars)"[:limit]
