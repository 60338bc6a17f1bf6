"""Which model a score is of, and its run in the tracking store."""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from vswin_dist import storage
from vswin_dist.errors import VswinError, after_start, before_start
from vswin_dist.evaluation import history, page
from vswin_dist.evaluation.analysis import Analysis, ClassRow
from vswin_dist.evaluation.evaluate import Views
from vswin_dist.evaluation.history import EXPERIMENT
from vswin_dist.evaluation.launch import RETRY, Evaluation, Request
from vswin_dist.evaluation.predictions import ALL
from vswin_dist.manifest import read_manifest
from vswin_dist.model_card import read_card
from vswin_dist.tracking import (
    DatasetRecord,
    Measured,
    ModelVersion,
    Names,
    Registry,
    Run,
    check_store,
    is_reference,
    open_run,
    source_version,
    tracking_uri,
    wait_for_store,
)


@dataclass(frozen=True)
class FoundModel:
    """A model to score, as every machine can find it, and the store that takes its scores."""

    reference: str  # models:/NAME/VERSION, or a folder or URL
    tracking_uri: str
    training_run: str | None
    version: ModelVersion | None = None  # as registered

    def request(self, data: str, views: Views, workers: int, s3_endpoint: str | None) -> Request:
        """Return the request to score this model on `data`."""
        return Request(self.reference, self.tracking_uri, storage.absolute(data), views, workers, s3_endpoint)

    @before_start()
    def views(self, clips: int | None, crops: int | None, batch: int, shuffle_frames: bool = False) -> Views:
        """Return the views that are asked for; None means as the model's card says.

        Raises:
            CheckpointError: there is no such model, or it was never trained.
        """
        known = read_card(Registry(self.tracking_uri).folder(self.reference)).data_settings().test_views
        return Views(clips or known[0], crops or known[1], batch, shuffle_frames)


@before_start()
def find_model(reference: str, uri: str | None, s3_endpoint: str | None) -> FoundModel:
    """Find the model that `reference` means now: `models:/...`, or a folder or URL.

    Raises:
        CheckpointError: there is none; says what there is.
        ConfigError: no such reference, or there is no registry.
        PreflightError: the store is away.
    """
    storage.use_s3_endpoint(s3_endpoint)
    store = tracking_uri(uri)
    if not is_reference(reference):
        return FoundModel(storage.absolute(reference), store, None)
    version = Registry(store).find(reference)
    return FoundModel(version.uri, store, version.run_id, version)


@before_start()
def check_tracking(uri: str) -> None:
    """Refuse a store that could not take the scores, before the hours that they take.

    Raises:
        PreflightError: it is away.
        ConfigError: its experiment cannot be used.
    """
    check_store(uri, Names(experiment=EXPERIMENT), make=True)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def files(evaluation: Evaluation, analysis: Analysis) -> dict[str, str]:
    """Write what an evaluation found as artifacts: path -> text."""
    names, scores = evaluation.predictions.identity.classes, evaluation.scores
    found = {
        "classes.csv": table([f.name for f in fields(ClassRow)], map(astuple, analysis.classes)),
        "confusion.csv": table(
            ["class", *names], ([n, *row] for n, row in zip(names, analysis.confusion.tolist(), strict=True))
        ),
        "calibration.json": json.dumps({"ece": analysis.ece, "bins": [asdict(b) for b in analysis.bins]}, indent=1),
    }
    if scores.missing:
        found["missing.txt"] = "".join(f"{k}: {r}\n" for k, r in scores.missing)
    return found


@dataclass(frozen=True)
class Logged:
    """What a run in the experiment of evaluations is told."""

    name: str
    settings: dict[str, Any]
    tags: dict[str, str]
    metrics: Mapping[str, float]
    texts: Mapping[str, str]  # artifacts
    ranks: int


def draw(model: FoundModel, data: str, evaluation: Evaluation, s3_endpoint: str | None) -> str:
    """Make the page of an evaluation beside its predictions; returns its folder, `""` with a warning where that fails."""
    identity, folder = evaluation.predictions.identity, evaluation.url.rpartition("/")[0]
    order = page.Order(
        title=f"{model.reference} on {identity.dataset}",
        out=folder,
        predictions=evaluation.url,
        data=data,
        facts={"views": identity.views, "fingerprint": identity.fingerprint, "predictions": evaluation.url},
        s3_endpoint=s3_endpoint,
    )
    try:
        page.make(order)
    except (VswinError, OSError) as error:
        print(f"warning: there is no page of this evaluation: {error}", file=sys.stderr, flush=True)
        return ""
    print(f"report  {storage.join(folder, page.PAGE)}", flush=True)
    return folder


def log(
    model: FoundModel,
    data: str,
    views: Views,
    evaluation: Evaluation,
    analysis: Analysis,
    ranks: int,
    top: int | None,
    drawn: str = "",
) -> str:
    """Log an evaluation as a run of its own, tagged with the model and its training run; returns the new run's id.

    Args:
        top: of each video the file of predictions has only so many classes; None: all.
        drawn: the folder of its page and pictures; "" where there are none.

    Raises:
        WorkFailed: the store is away, or the shards are; says how to retry.
    """
    identity = evaluation.predictions.identity
    scored = Logged(
        name=f"{model.reference.removeprefix('models:/')} on {identity.dataset}, {identity.views}",
        settings={"views": views, "model": model.reference},
        tags={
            "kind": "control" if identity.shuffle_frames else "evaluation",
            "model": model.reference,
            "training_run": model.training_run or "",
            "dataset": identity.dataset,
            "views": identity.views,
            "predictions": evaluation.url,
        },
        metrics={**evaluation.scores.metrics(), **analysis.metrics()},
        texts=files(evaluation, analysis),
        ranks=ranks,
    )
    with after_start(RETRY), log_run(model.tracking_uri, data, scored) as run:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, ALL)
            path.write_bytes(evaluation.predictions.to_parquet(top))
            run.artifact_file(ALL, path)
        if drawn:
            _log_pictures(run, drawn)
    if is_reference(model.reference):
        measured = Measured(0, [*run_metrics(scored.metrics)], read_manifest(data).name, identity.fingerprint)
        _describe(model, None if identity.shuffle_frames else measured, run.id)
    return run.id


def _log_pictures(run: Run, folder: str) -> None:
    """Hand the page and the pictures to the store; one that refuses them has the scores, and `folder` keeps them."""
    names = [page.PAGE, *(f"{page.PICTURES}/{n}" for n in storage.list_names(storage.join(folder, page.PICTURES)))]
    try:
        for name in names:
            run.artifact(name, storage.read_bytes(storage.join(folder, name)).decode())
    except VswinError as error:
        print(f"warning: the pictures are in {folder} alone: {error}", file=sys.stderr, flush=True)


def _describe(model: FoundModel, measured: Measured | None, run_id: str) -> None:
    """Bring the scores to the model: to its place among others, and into its description; who may not has logged them.

    Args:
        measured: None of a control, which says nothing of the model's worth.
    """
    try:
        if model.version and measured:
            Registry(model.tracking_uri).measure(model.version, run_id, measured)
        history.describe(model.tracking_uri, model.reference)
    except VswinError as error:
        print(f"warning: the description of {model.reference} lacks these scores: {error}", file=sys.stderr, flush=True)


@contextmanager
def log_run(uri: str, data: str | None, logged: Logged) -> Iterator[Run]:
    """Log a run in the experiment of evaluations, more of it in the block; it has failed where not all could be logged.

    Args:
        data: URL of the shards, where they are known.

    Raises:
        TrackingError: the store is away, and stays so for a while.
    """
    sets = []
    if data:
        manifest = read_manifest(data)
        sets = [DatasetRecord(manifest.name, manifest.fingerprint, data, "test", manifest.counts)]
    wait_for_store(uri)
    run = open_run(uri, EXPERIMENT, logged.name)
    try:
        run.start(
            settings=logged.settings,
            recipe=None,
            source=source_version(Path(__file__).parents[2]),
            world_size=logged.ranks,
            datasets=sets,
            files=logged.texts,
            tags=logged.tags,
        )
        run.log(0, run_metrics(logged.metrics))
        run.close()
        yield run
    except BaseException:
        run.end("FAILED")
        raise
    run.end("FINISHED")


def run_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Name metrics as the runs of evaluations do."""
    return {name.replace("val/", "test/"): value for name, value in metrics.items()}
