"""Runs and the registry of models, kept in MLflow or nowhere. Importing this imports no MLflow."""

from vswin_dist.tracking.logged import LoggedRun, curves, fetch, finished_runs, newest_run
from vswin_dist.tracking.names import Names
from vswin_dist.tracking.provenance import package_versions, redact, source_version
from vswin_dist.tracking.registry import CANDIDATE, CHAMPION, INFLATED, Measured, ModelVersion, Registry, is_reference
from vswin_dist.tracking.run import (
    NONE,
    DatasetRecord,
    NullRun,
    Run,
    RunReference,
    attach,
    below,
    check_store,
    open_run,
    tracking_uri,
    wait_for_store,
)
from vswin_dist.tracking.sync import send_kept

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "INFLATED",
    "NONE",
    "DatasetRecord",
    "LoggedRun",
    "Measured",
    "ModelVersion",
    "Names",
    "NullRun",
    "Registry",
    "Run",
    "RunReference",
    "attach",
    "below",
    "check_store",
    "curves",
    "fetch",
    "finished_runs",
    "is_reference",
    "newest_run",
    "open_run",
    "package_versions",
    "redact",
    "send_kept",
    "source_version",
    "tracking_uri",
    "wait_for_store",
]
