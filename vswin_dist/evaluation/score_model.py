"""Score a registered model or a checkpoint on a set of shards, in this process or over the ranks of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vswin_dist import storage
from vswin_dist.evaluation.evaluate import Rank, Views, evaluate
from vswin_dist.evaluation.metrics import Scores
from vswin_dist.manifest import check_same_classes, check_shard_sizes, read_manifest
from vswin_dist.serving.export import load_model, read_card
from vswin_dist.tracking import registry


@dataclass(frozen=True)
class Request:
    """What is scored on what, as plain values that Ray can ship."""

    model: str  # models:/NAME/VERSION, or a folder or URL with model.safetensors and model.json
    tracking_uri: str  # the store that knows a registered model
    data: str  # URL of the shards
    views: Views
    workers: int  # decoding processes of each rank
    s3_endpoint: str | None = None


def model_folder(request: Request) -> str:
    """Where the model's files are for this machine: a server's are downloaded once into its own data root.

    Raises:
        CheckpointError: no such model. PreflightError: the store cannot be reached from here.
    """
    storage.use_s3_endpoint(request.s3_endpoint)
    if not registry.is_reference(request.model):
        return request.model
    return registry.resolve_model(request.tracking_uri, request.model)[0]


def check(request: Request) -> None:
    """Refuse a model and data that do not fit, before any process is started.

    Raises:
        CheckpointError: no model there. DataError: no shards there, damaged ones, or of other classes.
    """
    storage.use_s3_endpoint(request.s3_endpoint)
    manifest = read_manifest(request.data)
    check_same_classes(read_card(model_folder(request)).classes, manifest.classes, f"the set {request.data}")
    check_shard_sizes(manifest, request.data)


def score_on_rank(request: Request, rank: Rank) -> Scores:
    """This rank's part of `request`; returns the scores of all ranks together, on each of them."""
    storage.use_s3_endpoint(request.s3_endpoint)
    manifest = read_manifest(request.data)
    model, card = load_model(model_folder(request))
    model.to(rank.device)
    dtype = next(model.parameters()).dtype
    data = replace(card.data_settings(), workers=request.workers)
    return evaluate(model, manifest, request.data, data, request.views, rank, dtype)
