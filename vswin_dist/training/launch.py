"""Run a training from its driver: start the ranks, and register the best checkpoint at the end.

A lost worker restarts the ranks within one submission; submitting the same `run.name` again resumes across submissions.
"""

from __future__ import annotations

import logging
import sys
import uuid
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from vswin_dist import cluster, lease, storage
from vswin_dist.device import STEPS_LEFT
from vswin_dist.errors import PreflightError, VswinError, after_start, before_start
from vswin_dist.lease import Fence
from vswin_dist.tracking import NullRun, Run, attach, open_run, redact, send_kept, source_version, spool
from vswin_dist.tracking.system_metrics import system_metrics
from vswin_dist.training import checkpoint, hangs, out_of_memory, progress, rank_metrics, run_record
from vswin_dist.training.dry_run import check_nodes, resources_of
from vswin_dist.training.fatal_error import Failure
from vswin_dist.training.pictures import pictured
from vswin_dist.training.registration import register_best
from vswin_dist.training.run_record import RunRecord
from vswin_dist.training.spec import TrainingSpec
from vswin_dist.training.start import log_start
from vswin_dist.training.stop_request import StopRequest
from vswin_dist.training.trainer import Trainer, WorkerConfig

RESUME = "Once that is mended, the same command resumes from the last checkpoint."


def train(recipe_text: str, spec: TrainingSpec, pyfunc: Path) -> dict[str, Any]:
    """Train to the end and register the best checkpoint as candidate, loaded by MLflow through `pyfunc`.

    Returns:
        run_id, checkpoint (URL of the best), model (`models:/NAME/VERSION`; the checkpoint where nothing is tracked),
        step and the metrics of the best.

    Raises:
        PreflightError: the cluster is too small, a store is away, or another driver trains this run; nothing was started.
            WorkFailed: the ranks failed, or MLflow refuses the model; the same command resumes from the last checkpoint.
            FencedOut: another driver has taken over.
    """
    with run_lease(spec) as fence, cluster.joined():
        check_unchanged(spec)
        check_nodes(spec)
        with before_start():
            tracking, record = open_tracking(spec, fence)
        try:
            with after_start(RESUME):
                run_record.write(spec.root, record)
                config = worker_config(spec, record, tracking)
                log_start(tracking, recipe_text, spec, config.lineage)
                with hangs.published(config.checkpoints, tracking), pictured(spec, config, tracking):
                    run_ranks(spec, config)
                fence.check()
                result = register_best(spec, config, tracking, pyfunc)
                last = checkpoint.list_checkpoints(config.checkpoints)[-1].position
                stalled = last.evaluations_since_best if last.step < spec.last_step else 0
                fence.check()
                run_record.write(spec.root, replace(record, finished=True, step=last.step, stalled=stalled))
        except BaseException as error:
            tracking.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        tracking.end("FINISHED")
        send_waiting(tracking, spec.root, is_over=True)
        return result


def run_lease(spec: TrainingSpec) -> AbstractContextManager[Fence]:
    """Hold the lease of the run's name, for the time of the block."""
    run = spec.settings.run
    remedy = (
        "let it train, or end it there; where it is dead or cut off, run.take_over=true takes the run from it; "
        "for another training give another run.name"
    )
    return lease.held(storage.join(spec.root, lease.FOLDER), f"the training run {run.name!r}", remedy, run.take_over)


def check_unchanged(spec: TrainingSpec) -> None:
    """Refuse to go on from what preflight found, where another driver has changed it before the lease was ours.

    Raises:
        PreflightError: says so.
    """
    with before_start():
        number = spec.number if spec.resumes else run_record.next_number(spec.root)
        if number != spec.number or (spec.resumes and run_record.read(spec.root) != spec.resumes):
            name = spec.settings.run.name
            raise PreflightError(f"the training run {name!r} was changed by another driver just now: give the command again")


def open_tracking(spec: TrainingSpec, fence: Fence) -> tuple[Run, RunRecord]:
    """Open the run in its store, and send what earlier submissions could not; returns the run and its record."""
    s = spec.settings
    opened = open_run(spec.tracking_uri, s.tracking.experiment, s.run.name, spec.resumes.run_id if spec.resumes else None)
    record = RunRecord(opened.id, spec.train.fingerprint, run_record.recorded(s), number=spec.number, steps=spec.last_step)
    place = storage.join(record.checkpoints(spec.root), spool.FOLDER)
    tracking = attach(replace(opened.reference, spool=place, fence=fence))
    send_waiting(tracking, spec.root, is_over=False)
    return tracking, record


def send_waiting(tracking: Run, root: str, is_over: bool) -> None:
    """Send what the store has not taken so far; where it still does not, say what that is and how it is sent later."""
    try:
        if tracking.spool and tracking.spool.waiting():
            print(f"sent to MLflow now: {', '.join(send_kept(tracking.reference, is_over))}", flush=True)
    except VswinError as error:
        state = "The training is complete" if is_over else "The training goes on"
        print(
            f"warning: {error} {state}; what MLflow has not got is kept in {tracking.reference.spool}, and sent by\n"
            f"    python -m vswin_dist.tracking sync {root}",
            file=sys.stderr,
            flush=True,
        )


def run_ranks(spec: TrainingSpec, config: WorkerConfig) -> None:
    """Train on the ranks until the last step.

    Raises:
        KeyboardInterrupt: the driver was told to stop, and the ranks have stopped. WorkFailed: they failed.
    """
    request = StopRequest(config.checkpoints, config.submission)
    grace_s = spec.settings.training.grace_s
    with request.made_by_signals(grace_s) as stopped, Failure(config.checkpoints, config.submission).reported():
        last = cluster.run_ranks(train_worker, {"config": config}, resources_of(spec), spec.settings.run.name, spec.root)
        if stopped.is_set() and last.get(STEPS_LEFT):
            raise KeyboardInterrupt


def worker_config(spec: TrainingSpec, record: RunRecord, tracking: Run) -> WorkerConfig:
    """Gather what every rank needs, and the lineage that models of this run carry."""
    s = spec.settings
    lineage = {
        "dataset_fingerprint": spec.train.fingerprint,
        "initialised_from": s.model.init and redact(s.model.init),
        "training_run": tracking.id,
        "source_commit": source_version(Path(__file__).parents[2]),
        "recipe": s.recipe,
    }
    checkpoints = record.checkpoints(spec.root)
    if checkpoint.list_checkpoints(checkpoints):  # nothing is left of where it started from
        s = replace(s, model=replace(s.model, init=None))
    return WorkerConfig(
        s, checkpoints, tracking.reference, lineage, submission=uuid.uuid4().hex, classes=len(spec.train.classes)
    )


def train_worker(config: dict[str, Any]) -> None:
    """Train on one rank; what Ray Train runs on each."""
    for name in list(logging.root.manager.loggerDict):  # two lines of theirs for every checkpoint and rank
        if name.startswith("ray.train") or "/ray/train/" in name:
            logging.getLogger(name).setLevel(logging.WARNING)
    worker: WorkerConfig = config["config"]
    storage.use_s3_endpoint(worker.settings.storage.s3_endpoint)
    failure = Failure(worker.checkpoints, worker.submission)
    if failure.exists():  # restarted after an error that another attempt would meet too
        return
    rank = cluster.this_rank()
    tracking = attach(worker.run) if rank.is_main else NullRun()
    rank_metrics.export(tracking, rank, worker.settings.run.name)
    if rank.is_main:
        hangs.publish(worker.checkpoints, tracking)
    with (
        closing(tracking),  # last: metrics before a failure tell why
        failure.recorded(),
        after_start(RESUME),
        out_of_memory.explained(worker.settings, worker.classes, rank),
        hangs.watched(worker.checkpoints, rank, worker.settings.training.hang_s) as heartbeat,
        progress.shown(worker.checkpoints, rank, worker.run.fence, heartbeat),
        system_metrics(tracking, worker.run, rank, lambda: heartbeat.last.step),
    ):
        Trainer.build(worker, rank, tracking, cluster.report, heartbeat).run()
