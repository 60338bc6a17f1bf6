"""Score a registered model or a checkpoint on a set of shards, in this process or over the ranks of a Ray cluster.

What a rank has scored it writes every half minute; whoever is asked for the same scores later goes on from there.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

import torch

from vswin_dist import cluster, local_files, storage
from vswin_dist.cluster import Resources
from vswin_dist.data.plan import evaluation_batches
from vswin_dist.device import Rank
from vswin_dist.errors import WorkFailed, after_start, before_start
from vswin_dist.evaluation.evaluate import Scorer, Views
from vswin_dist.evaluation.metrics import Scores
from vswin_dist.evaluation.metrics import score as score_of
from vswin_dist.evaluation.predictions import Found, Identity, Predictions, Store, left
from vswin_dist.evaluation.progress import Progress
from vswin_dist.manifest import Manifest, check_same_classes, check_shard_sizes, read_manifest
from vswin_dist.model_card import CARD, WEIGHTS, read_card
from vswin_dist.models.weights.portable import load_model
from vswin_dist.tracking import Registry

RETRY = "Once that is mended, the same command goes on with what is scored."


@dataclass(frozen=True)
class Request:
    """What is scored on what, as plain values that Ray can ship."""

    model: str  # models:/NAME/VERSION, or a folder or URL with model.safetensors and model.json
    tracking_uri: str  # the store that knows a registered model
    data: str  # URL of the shards
    views: Views
    workers: int  # decoding processes of each rank
    s3_endpoint: str | None = None
    save_every_s: float = 30.0  # what a rank found is written so often


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation ends with."""

    scores: Scores
    predictions: Predictions
    url: str  # of the file that holds them


def model_folder(request: Request) -> str:
    """Find the model's files for this machine: a server's are downloaded once into its own data root.

    Raises:
        CheckpointError: no such model.
        TrackingError: the store cannot be reached from here.
    """
    storage.use_s3_endpoint(request.s3_endpoint)
    return Registry(request.tracking_uri).folder(request.model)


@before_start()
def check(request: Request) -> None:
    """Refuse a model and data that do not fit, before any process is started.

    Raises:
        CheckpointError: no model there. DataError: no shards there, damaged ones, or of other classes.
    """
    storage.use_s3_endpoint(request.s3_endpoint)
    manifest = read_manifest(request.data)
    check_same_classes(read_card(model_folder(request)).classes, manifest.classes, f"the set {request.data}")
    check_shard_sizes(manifest, request.data)


def identify(request: Request, manifest: Manifest, use_gpu: bool) -> Identity:
    """Say what the scores will depend on; the model's files are read for it."""
    folder = storage.absolute(model_folder(request))
    weights, card = (storage.sha256(storage.join(folder, name)) for name in (WEIGHTS, CARD))
    return request.views.identity(manifest, weights=weights, card=card, device="cuda" if use_gpu else "cpu")


def score_on_rank(request: Request, store: Store, rank: Rank) -> int:
    """Score this rank's part of what is left of `request`, and write it into `store`; returns the number of its videos."""
    storage.use_s3_endpoint(request.s3_endpoint)
    manifest = read_manifest(request.data)
    model, card = load_model(model_folder(request))
    model.to(rank.device)
    data = replace(card.data_settings(), workers=request.workers)
    views, samples, classes = request.views, len(manifest.samples), len(manifest.classes)
    todo = rank.broadcast(left(store.read(), samples, views.videos) if rank.is_main else [])
    batches, _ = evaluation_batches(samples, rank.rank, rank.world_size, views.videos, todo)
    scorer = Scorer(model, manifest, request.data, data, views, rank.device, next(model.parameters()).dtype)
    progress = Progress(rank, samples, min(samples, len(todo) * views.videos), views.of_a_video)
    parts, saved = [], time.monotonic()
    for number, found in enumerate(scorer.rounds(batches, len(batches)), start=1):
        parts.append(found)
        last = number == len(batches)
        progress.show(len(found.indices) + len(found.missing), last)
        if last or time.monotonic() - saved >= request.save_every_s:
            store.add(Found.joined(parts, classes), manifest)
            parts, saved = [], time.monotonic()
    return progress.done


def score(request: Request, ranks: int, use_gpu: bool, storage_root: str | None = None, fresh: bool = False) -> Evaluation:
    """Score a model on `ranks` processes; a single one without a GPU request runs in this process, without Ray.

    Args:
        storage_root: URL below which predictions are kept, and where Ray keeps its state meanwhile; None: the data root,
            which other nodes do not reach.
        fresh: forget what was scored before.

    Raises:
        PreflightError: the cluster is too small, or `storage_root` cannot be written.
        WorkFailed: a rank failed, or what is read fails meanwhile.
    """
    root = storage.absolute(storage_root or str(local_files.home()))
    with before_start():
        manifest = read_manifest(request.data)
        store = Store.below(root, identify(request, manifest, use_gpu))
        storage.check_writable(root)
        if fresh:
            store.clear()
        todo = left(store.read(), len(manifest.samples), request.views.videos)
    if not todo:
        print(
            f"all {len(manifest.samples):,} videos were scored before; jobs/evaluate.py --fresh scores them again",
            flush=True,
        )
    if todo and (ranks > 1 or use_gpu):
        _score_on_cluster(request, store, Resources((ranks,), use_gpu, 1.0, max_failures=0), root)
    with after_start(RETRY):
        if todo and ranks == 1 and not use_gpu:
            score_on_rank(request, store, Rank(0, 1, torch.device("cpu")))
        return collect(store, manifest)


def collect(store: Store, manifest: Manifest) -> Evaluation:
    """Gather what the ranks wrote into `store`.

    Raises:
        WorkFailed: a video is not there.
    """
    found = store.read()
    if lost := len(manifest.samples) - len(found.indices) - len(found.missing):
        raise WorkFailed(
            f"{lost} of {len(manifest.samples)} videos are not in {store.url}: the ranks wrote elsewhere, or their files "
            "were removed. Give --storage-root URL, a place that this machine and all nodes reach"
        )
    found.check(manifest)
    predictions = store.finish(found, manifest)
    return Evaluation(score_of(found.probabilities, found.labels, predictions.missing), predictions, store.predictions)


def _score_on_cluster(request: Request, store: Store, resources: Resources, root: str) -> None:
    with cluster.joined():
        cluster.check_resources(resources, "--ranks")
        state = storage.join(root, f"evaluate-{uuid.uuid4().hex[:8]}")
        try:
            with after_start(RETRY):
                cluster.run_ranks(score_worker, {"request": request, "store": store}, resources, "evaluate", state)
        finally:
            storage.remove(state, recursive=True)


def score_worker(config: dict[str, Any]) -> None:
    """Score a model on one rank; what Ray Train runs on each."""
    if cluster.local_rank() == 0:
        model_folder(config["request"])  # of each node, one rank fetches what the others find
    torch.distributed.barrier()
    videos = score_on_rank(config["request"], config["store"], cluster.this_rank())
    cluster.report({"videos": videos}, "")
