"""The driver's part of a training, and what it has every rank do.

`train` checks everything, opens the MLflow run, starts the ranks and registers the best checkpoint. A lost worker
restarts the ranks within one submission; submitting the same `run.name` again resumes across submissions.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vswin_dist import storage
from vswin_dist.config import to_flat
from vswin_dist.errors import VswinError
from vswin_dist.evaluation.evaluate import Rank
from vswin_dist.evaluation.metrics import Scores
from vswin_dist.evaluation.score_model import Request, model_folder, score_on_rank
from vswin_dist.tracking import provenance, registry, run
from vswin_dist.training import checkpoint, cluster, identity, loop
from vswin_dist.training.cluster import Resources
from vswin_dist.training.failure import Failure
from vswin_dist.training.optim import groups_table
from vswin_dist.training.prepared import Prepared


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every rank."""
    for name in list(logging.root.manager.loggerDict):  # two lines of theirs for every checkpoint and rank
        if name.startswith("ray.train") or "/ray/train/" in name:
            logging.getLogger(name).setLevel(logging.WARNING)
    storage.use_s3_endpoint(config["settings"]["storage.s3_endpoint"])
    job = loop.Job(**config)
    failure = Failure(job.root, job.submission)
    if failure.exists():  # restarted after an error that another attempt would meet again
        return
    try:
        loop.train(job, cluster.this_rank(), cluster.report)
    except VswinError as error:
        failure.write(error)
        raise


def train(recipe_text: str, prepared: Prepared) -> dict[str, Any]:
    """Train to the end and register the best checkpoint as champion.

    Returns:
        run_id, checkpoint (URL of the best), model (``models:/NAME/VERSION``), step and the metrics of the best.

    Raises:
        PreflightError: the cluster is too small. WorkFailed: the ranks failed; submitting again resumes from the last
            checkpoint.
    """
    with cluster.joined():
        return _train(recipe_text, prepared)


def _train(recipe_text: str, prepared: Prepared) -> dict[str, Any]:
    s = prepared.settings
    resources = Resources(tuple(prepared.worlds), s.training.use_gpu, s.training.cpus_per_worker, s.training.max_failures)
    cluster.check_resources(resources, "training.min_workers" if s.training.min_workers else "training.workers")
    uri, root = prepared.tracking_uri, prepared.root
    run_id = run.open_run(uri, s.tracking.experiment, s.run.name, prepared.resumes.run_id if prepared.resumes else None)
    mine = identity.Identity(run_id, prepared.train.fingerprint, to_flat(s), finished=False, step=0)
    checkpoints = storage.join(root, run_id)
    try:
        identity.write_identity(root, mine)
        lineage = record_start(recipe_text, prepared, run_id)
        begun = bool(checkpoint.list_checkpoints(checkpoints))  # then nothing is left of where it started from
        settings = to_flat(s) | ({"model.init": None} if begun else {})
        job = loop.Job(settings, checkpoints, run_id, uri, lineage, submission=uuid.uuid4().hex)
        failure = Failure(checkpoints, job.submission)
        with failure.told():
            cluster.run_ranks(train_worker, vars(job), resources, s.run.name, root)
        best = checkpoint.best(checkpoint.list_checkpoints(checkpoints))
        assert best, "a training that ended has a checkpoint"
        name = s.tracking.register_as or s.run.name
        scores = {k.removeprefix("val/"): round(v, 4) for k, v in best.position.metrics.items()}
        version = registry.register_model(uri, name, best.url, alias="champion", run_id=run_id,
                                          tags=lineage | {"step": best.position.step} | scores)
    except BaseException as error:
        run.end_run(uri, run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.end_run(uri, run_id, "FINISHED")
    done = checkpoint.list_checkpoints(checkpoints)[-1].position.step
    identity.write_identity(root, replace(mine, finished=True, step=done))
    return {"run_id": run_id, "checkpoint": best.url, "model": f"models:/{name}/{version}",
            "step": best.position.step, **best.position.metrics}


def record_start(recipe_text: str, prepared: Prepared, run_id: str) -> dict[str, Any]:
    """Log everything that is known before the first step; returns the lineage that models of this run carry."""
    s = prepared.settings
    lineage = {"dataset_fingerprint": prepared.train.fingerprint, "initialised_from": s.model.init, "training_run": run_id,
               "source_commit": provenance.source_version(Path(__file__).parents[2]), "recipe": s.recipe}
    datasets = [run.DatasetRecord(prepared.train.name, prepared.train.fingerprint, s.data.train, "training",
                                  prepared.train.counts)]
    if prepared.val and s.data.val:
        datasets.append(run.DatasetRecord(prepared.val.name, prepared.val.fingerprint, s.data.val, "validation",
                                          prepared.val.counts))
    files = {"parameter_groups.md": groups_table(prepared.groups, s.optim.lr)}
    if prepared.load_report:
        files["load_report.txt"] = prepared.load_report
    run.log_start(prepared.tracking_uri, run_id, settings=to_flat(s), recipe=recipe_text,
                  source=str(lineage["source_commit"]), world_size=max(prepared.worlds), datasets=datasets, files=files)
    return lineage


def score(request: Request, ranks: int, use_gpu: bool, storage_root: str | None = None) -> Scores:
    """Score a model on `ranks` processes; a single one without a GPU request runs in this process, without Ray.

    Args:
        storage_root: URL where Ray keeps its state meanwhile; None: the data root, which other nodes do not reach.

    Raises:
        DataError: `storage_root` cannot be written. PreflightError: the cluster is too small. WorkFailed: a rank failed.
    """
    if ranks == 1 and not use_gpu:
        return score_on_rank(request, Rank(0, 1, torch.device("cpu")))
    with cluster.joined():
        resources = Resources((ranks,), use_gpu, 1.0, max_failures=0)
        cluster.check_resources(resources, "--ranks")
        root = storage.join(storage.absolute(storage_root or str(storage.home())), f"evaluate-{uuid.uuid4().hex[:8]}")
        try:
            storage.check_writable(root)
            return Scores(**cluster.run_ranks(score_worker, {"request": request}, resources, "evaluate", root)["scores"])
        finally:
            storage.remove(root, recursive=True)


def score_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every rank to score a model."""
    if cluster.local_rank() == 0:
        model_folder(config["request"])  # of each node, one rank fetches what the others find
    torch.distributed.barrier()
    scores = score_on_rank(config["request"], cluster.this_rank())
    cluster.report({"scores": asdict(scores)}, "")
