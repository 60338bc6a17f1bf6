"""Ray Train: the driver's part of a training. With `elastic` the only module of this package that imports Ray.

`train` checks everything, opens the MLflow run, starts the ranks and registers the best checkpoint. A lost worker
restarts the ranks within one submission; submitting the same `run.name` again resumes across submissions.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vswin_dist import storage
from vswin_dist.config import to_flat
from vswin_dist.errors import PreflightError, VswinError, WorkFailed
from vswin_dist.evaluation.evaluate import Rank
from vswin_dist.evaluation.metrics import Scores
from vswin_dist.evaluation.score_model import Request, model_folder, score_on_rank
from vswin_dist.tracking import provenance, registry, run
from vswin_dist.training import checkpoint, identity, loop
from vswin_dist.training.failure import Failure
from vswin_dist.training.optim import groups_table
from vswin_dist.training.prepared import Prepared

# Ray Train hands these on to the ranks. The first bounds how late a dead rank is seen; without the second, what a rank
# prints appears twice.
WORKER_ENV = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}


@dataclass(frozen=True)
class Resources:
    """What the ranks of a Ray Train job get."""

    worlds: tuple[int, ...]  # numbers of ranks that it may run on, ascending; the cluster's room decides between them
    use_gpu: bool
    cpus_per_worker: float
    max_failures: int


@contextmanager
def cluster() -> Iterator[None]:
    """Join the Ray cluster of ``RAY_ADDRESS`` or of this job; without one, start Ray on this machine, and end it."""
    import ray

    os.environ.update(WORKER_ENV)
    mine = not ray.is_initialized()
    if mine:
        ray.init(address=os.environ.get("RAY_ADDRESS", "local"), log_to_driver=True, include_dashboard=True)
        # `ray job stop` and batch systems send SIGTERM. Ray's handler of it aborts the process; that of SIGINT is orderly.
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def check_resources(resources: Resources, setting: str) -> None:
    """Refuse a number of ranks, which `setting` sets, that the cluster can never hold, its autoscaler's nodes counted.

    Raises:
        PreflightError: fewer CPUs or GPUs than asked for; names `setting`.
    """
    import ray
    from ray._private.state import state

    have = ray.cluster_resources()
    could = state.get_max_resources_from_cluster_config() or {}  # None where no autoscaler told what it may start
    least = resources.worlds[0]
    need = {"CPU": least * resources.cpus_per_worker} | ({"GPU": least} if resources.use_gpu else {})
    for kind, amount in need.items():
        most = max(have.get(kind, 0), could.get(kind, 0))
        if most < amount:
            raise PreflightError(f"{setting}={least} needs {amount:g} {kind}s, the Ray cluster has {most:g}. "
                                 f"Lower {setting}, or add nodes.")


def run_ranks(worker: Callable[[dict[str, Any]], None], config: dict[str, Any], resources: Resources, name: str,
              root: str) -> dict[str, Any]:
    """Run `worker(config)` on every rank with torch.distributed up; returns the metrics that were reported last.

    Args:
        worker: a function of an importable module.
        root: URL where Ray keeps its own small state; every node must reach it.

    Raises:
        WorkFailed: a rank failed more often than allowed. KeyboardInterrupt: the job was stopped.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from vswin_dist.training.elastic import FittingTrainer

    least, most = resources.worlds[0], resources.worlds[-1]
    path, filesystem = _ray_storage(storage.join(root, "ray"))
    each = {"CPU": resources.cpus_per_worker} | ({"GPU": 1} if resources.use_gpu else {})
    trainer = FittingTrainer(
        worker, train_loop_config=config, worlds=resources.worlds,
        scaling_config=ScalingConfig(num_workers=(least, most) if least < most else most, use_gpu=resources.use_gpu,
                                     resources_per_worker=each),
        torch_config=TorchConfig(backend=None, timeout_s=1800),
        run_config=RunConfig(name=f"{name}-{uuid.uuid4().hex[:8]}", storage_path=path, storage_filesystem=filesystem,
                             checkpoint_config=CheckpointConfig(num_to_keep=1),
                             failure_config=FailureConfig(max_failures=resources.max_failures)))
    try:
        return dict(trainer.fit().metrics or {})
    except SystemExit as stop:  # how Ray answers SIGINT, with exit code 0
        raise KeyboardInterrupt from stop
    except Exception as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise WorkFailed(f"{name}: a worker failed: {cause[-1]} (full trace above)") from error


def _ray_storage(url: str) -> tuple[str, Any]:
    """(path, pyarrow file system or None) for Ray: its own S3 client fails against other endpoints than AWS."""
    if storage.is_local(url):
        return url, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = storage.filesystem(url)
    return path, PyFileSystem(FSSpecHandler(filesystem))


def this_rank() -> Rank:
    """The calling Ray Train worker's rank, world size and device."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        torch.set_num_threads(max(threads, 1))
    return Rank(context.get_world_rank(), context.get_world_size(), device)


def report(metrics: dict[str, float], checkpoint_url: str | None) -> None:
    """Tell Ray of a checkpoint; every rank calls it. Ray's own only names ours."""
    import ray.train

    if checkpoint_url is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "portable_checkpoint.txt").write_text(checkpoint_url)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


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
        loop.train(job, this_rank(), report)
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
    with cluster():
        return _train(recipe_text, prepared)


def _train(recipe_text: str, prepared: Prepared) -> dict[str, Any]:
    s = prepared.settings
    resources = Resources(tuple(prepared.worlds), s.training.use_gpu, s.training.cpus_per_worker, s.training.max_failures)
    check_resources(resources, "training.min_workers" if s.training.min_workers else "training.workers")
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
            run_ranks(train_worker, vars(job), resources, s.run.name, root)
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
    with cluster():
        resources = Resources((ranks,), use_gpu, 1.0, max_failures=0)
        check_resources(resources, "--ranks")
        root = storage.join(storage.absolute(storage_root or str(storage.home())), f"evaluate-{uuid.uuid4().hex[:8]}")
        try:
            storage.check_writable(root)
            return Scores(**run_ranks(score_worker, {"request": request}, resources, "evaluate", root)["scores"])
        finally:
            storage.remove(root, recursive=True)


def score_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every rank to score a model."""
    import ray.train

    if ray.train.get_context().get_local_rank() == 0:
        model_folder(config["request"])  # of each node, one rank fetches what the others find
    torch.distributed.barrier()
    scores = score_on_rank(config["request"], this_rank())
    with tempfile.TemporaryDirectory() as folder:  # Ray keeps metrics only beside a checkpoint
        ray.train.report({"scores": asdict(scores)}, checkpoint=ray.train.Checkpoint.from_directory(folder))
