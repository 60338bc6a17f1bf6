"""MLflow: one run for one training, and the registry of models. Importing this imports no MLflow."""

from vswin_dist.tracking.metrics import MetricLogger
from vswin_dist.tracking.provenance import package_versions, source_version
from vswin_dist.tracking.registry import (
    ModelVersion,
    find_version,
    is_reference,
    register_model,
    resolve_model,
    set_alias,
)
from vswin_dist.tracking.run import DatasetRecord, end_run, log_start, open_run, tracking_uri

__all__ = [
    "DatasetRecord", "MetricLogger", "ModelVersion", "end_run", "find_version", "is_reference", "log_start",
    "open_run", "package_versions", "register_model", "resolve_model", "set_alias", "source_version",
    "tracking_uri",
]
