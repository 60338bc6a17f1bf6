"""Which model a score is of, and its entry in MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vswin_dist import storage
from vswin_dist.evaluation.evaluate import Views
from vswin_dist.evaluation.metrics import Scores
from vswin_dist.evaluation.score_model import Request
from vswin_dist.manifest import read_manifest
from vswin_dist.tracking import backend, registry
from vswin_dist.tracking.metrics import MetricLogger
from vswin_dist.tracking.provenance import source_version
from vswin_dist.tracking.run import DatasetRecord, end_run, log_start, open_run, tracking_uri

EXPERIMENT = "vswin-evaluations"


@dataclass(frozen=True)
class FoundModel:
    """A model to score, as every machine can find it, and the store that takes its scores."""

    reference: str  # models:/NAME/VERSION, or a folder or URL
    tracking_uri: str
    training_run: str | None

    def request(self, data: str, views: Views, workers: int, s3_endpoint: str | None) -> Request:
        """The request to score this model on `data`."""
        return Request(self.reference, self.tracking_uri, storage.absolute(data), views, workers, s3_endpoint)


def find_model(reference: str, uri: str | None, s3_endpoint: str | None) -> FoundModel:
    """The model that `reference` means now: ``models:/...``, or a folder or URL.

    Raises:
        CheckpointError: there is none; says what there is.
    """
    storage.use_s3_endpoint(s3_endpoint)
    store = tracking_uri(uri)
    if not registry.is_reference(reference):
        return FoundModel(storage.absolute(reference), store, None)
    version = registry.find_version(store, reference)
    return FoundModel(version.uri, store, version.run_id)


def check_store(uri: str) -> None:
    """Refuse a store that could not take the scores, before the hours that they take.

    Raises:
        PreflightError: it cannot be reached. ConfigError: its experiment cannot be used.
    """
    with backend.reachable(uri):
        backend.experiment_id(uri, EXPERIMENT)


def log(model: FoundModel, data: str, views: Views, scores: Scores, ranks: int) -> str:
    """Log `scores` as a run of their own, tagged with the model and its training; returns the run's id."""
    manifest = read_manifest(data)
    name = f"{model.reference.removeprefix('models:/')} on {manifest.name} {manifest.split}"
    run_id = open_run(model.tracking_uri, EXPERIMENT, name)
    log_start(model.tracking_uri, run_id, settings={"views": views, "model": model.reference}, recipe=None,
              source=source_version(Path(__file__).parents[2]), world_size=ranks,
              datasets=[DatasetRecord(manifest.name, manifest.fingerprint, data, "test", manifest.counts)],
              files={"missing.txt": "".join(f"{k}: {r}\n" for k, r in scores.missing)} if scores.missing else {},
              tags={"model": model.reference, "training_run": model.training_run or ""})
    logger = MetricLogger(model.tracking_uri, run_id)
    logger.log(0, {k.replace("val/", "test/"): v for k, v in scores.metrics().items()})
    logger.close()
    end_run(model.tracking_uri, run_id, "FINISHED")
    return run_id
