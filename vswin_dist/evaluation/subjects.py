"""The two sides of a comparison: models that are scored for it, or predictions that there are; and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from vswin_dist import local_files, storage
from vswin_dist.errors import ConfigError, after_start, before_start
from vswin_dist.evaluation import launch, report
from vswin_dist.evaluation.compare import Comparison, page
from vswin_dist.evaluation.launch import RETRY, Request
from vswin_dist.evaluation.options import Asked
from vswin_dist.evaluation.predictions import Identity, Predictions, read
from vswin_dist.evaluation.report import Logged, find_model, log_run, table
from vswin_dist.manifest import read_manifest
from vswin_dist.tracking import tracking_uri


@dataclass(frozen=True)
class Subject:
    """One side: a model that is to be scored, or what was scored of one."""

    name: str
    identity: Identity
    source: Request | Predictions

    def predictions(self, asked: Asked) -> Predictions:
        """Score the model, or take the scores there are; raises as `launch.score` does."""
        if isinstance(self.source, Predictions):
            return self.source
        return launch.score(self.source, asked.ranks, asked.use_gpu, asked.storage_root).predictions


@before_start()
def find_subject(reference: str, asked: Asked) -> Subject:
    """Find what `reference` means: a file of predictions, by its ending `.parquet`, or a model.

    Raises:
        ConfigError: a model, and no data to score it on.
        DataError: no such predictions. CheckpointError: no such model.
    """
    storage.use_s3_endpoint(asked.s3_endpoint)
    if reference.endswith(".parquet"):
        try:
            found = read(storage.absolute(reference))
        except FileNotFoundError as error:
            raise ConfigError(f"no predictions at {reference}") from error
        return Subject(reference, found.identity, found)
    if asked.data is None:
        raise ConfigError(f"{reference} is a model: name the shards to score it on in --data")
    model = find_model(reference, asked.tracking_uri, asked.s3_endpoint)
    views = model.views(asked.clips, asked.crops, asked.batch)
    request = model.request(asked.data, views, asked.workers, asked.s3_endpoint)
    launch.check(request)
    identity = launch.identify(request, read_manifest(request.data), asked.use_gpu)
    return Subject(model.reference, identity, request)


def files(comparison: Comparison) -> dict[str, str]:
    """Write a comparison as a page and as tables: name -> text."""
    c = comparison
    return {
        "compare.html": page(c),
        "scores.csv": table(
            ["score", "a", "b", "difference", "low", "high", "better"],
            ([d.score, d.a, d.b, *asdict(d.difference).values(), d.better] for d in c.differences),
        ),
        "classes.csv": table(
            ["class", "videos", "a", "b", "difference"], ([x.name, x.videos, x.a, x.b, x.difference] for x in c.classes)
        ),
        "videos.csv": table(
            ["change", "video", "class", "a", "a_probability", "b", "b_probability"],
            (["gained" if v.gained else "lost", *asdict(v).values()] for v in c.changes),
        ),
    }


def write(comparison: Comparison, out: str | None, storage_root: str | None, texts: Mapping[str, str]) -> str:
    """Write `texts` into the folder `out`, or one of its own below the storage root; returns it.

    Raises:
        StorageError: it cannot be written.
    """
    root = storage_root or str(local_files.home())
    name = "-".join(identity.key for identity in comparison.identities)
    folder = storage.absolute(out or storage.join(root, "comparisons", name))
    with after_start(RETRY):
        for path, text in texts.items():
            storage.put_bytes(storage.join(folder, path), text.encode())
    return folder


def log(comparison: Comparison, asked: Asked, texts: Mapping[str, str], kind: str = "comparison", **tags: str) -> str:
    """Log a comparison as a run of its own in the experiment of evaluations; returns the run's id.

    Args:
        kind: what it is made for. tags: further ones.

    Raises:
        WorkFailed: the store is away; says how to retry.
    """
    a, b = comparison.identities
    names = [side.removeprefix("models:/") for side in (comparison.b, comparison.a)]
    logged = Logged(
        name=f"{kind}: {' against '.join(names)} on {a.dataset}",
        settings={"a": comparison.a, "b": comparison.b, "views_a": a.views, "views_b": b.views},
        tags={
            "kind": kind,
            "model_a": comparison.a,
            "model_b": comparison.b,
            "dataset": a.dataset,
            "views": a.views if a.views == b.views else f"A {a.views}, B {b.views}",
            **tags,
        },
        metrics=comparison.metrics(),
        texts=texts,
        ranks=asked.ranks,
    )
    data = asked.data and storage.absolute(asked.data)
    with after_start(RETRY), log_run(tracking_uri(asked.tracking_uri), data, logged) as run:
        return run.id


def check_tracking(asked: Asked) -> None:
    """Refuse a store that could not take the comparison; raises as `report.check_tracking` does."""
    report.check_tracking(tracking_uri(asked.tracking_uri))
