"""Ray Train: the cluster, and ranks on as many of its machines as it has room for. The only module here that imports Ray."""

from __future__ import annotations

import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train import report as ray_report
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

from vswin_dist import storage
from vswin_dist.errors import PreflightError, WorkFailed
from vswin_dist.evaluation.evaluate import Rank
from vswin_dist.training.loop import STEPS_LEFT

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
def joined() -> Iterator[None]:
    """Join the Ray cluster of ``RAY_ADDRESS`` or of this job; without one, start Ray on this machine, and end it."""
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
    """Refuse a number of ranks, which `setting` sets, that the cluster does not hold, were it free.

    Raises:
        PreflightError: fewer CPUs or GPUs than asked for; names `setting`.
    """
    have = ray.cluster_resources()
    least = resources.worlds[0]
    need = {"CPU": least * resources.cpus_per_worker} | ({"GPU": least} if resources.use_gpu else {})
    for kind, amount in need.items():
        if have.get(kind, 0) < amount:
            raise PreflightError(f"{setting}={least} needs {amount:g} {kind}s, the Ray cluster has "
                                 f"{have.get(kind, 0):g}. Lower {setting}, or add nodes.")


class FittingWorlds(ElasticScalingPolicy):
    """Takes the largest of `worlds` that the cluster has room for, and grows just after a checkpoint was saved.

    When ranks are lost, Ray restarts the job, and asks for its size then.
    """

    def __init__(self, scaling_config: ScalingConfig, worlds: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.worlds = sorted(worlds)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # What is reserved is looked at every 20 s; ranks asked of a node that died since are waited for in vain.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        room = super()._count_possible_workers({n: r for n, r in reserved_resources.items() if n in alive})
        return max((w for w in self.worlds if w <= room), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: WorkerGroupState,
                                               worker_group_status: WorkerGroupPollStatus) -> ScalingDecision:
        """Another size where a rank has just reported a checkpoint and steps are left; else none. None is lost to it."""
        self._maybe_send_resource_request()
        reports = [s.training_report for s in worker_group_status.worker_statuses.values() if s.training_report]
        reserved = self._get_reserved_resources()
        if reserved is None or not any(r.checkpoint and r.metrics.get(STEPS_LEFT, 0) for r in reports):
            return NoopDecision()
        world = self._count_possible_workers(reserved)
        return self._get_resize_decision(world) if world > worker_group_state.num_workers else NoopDecision()


class FittingTrainer(TorchTrainer):
    """`TorchTrainer` that runs on one of `worlds` where its `ScalingConfig` gives a range of workers."""

    def __init__(self, *args: Any, worlds: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.worlds = worlds

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            kwargs["scaling_policy"] = FittingWorlds(self.scaling_config, self.worlds)
        return super()._initialize_and_run_controller(**kwargs)


def run_ranks(worker: Callable[[dict[str, Any]], None], config: dict[str, Any], resources: Resources, name: str,
              root: str) -> dict[str, Any]:
    """Run `worker(config)` on every rank with torch.distributed up; returns the metrics that were reported last.

    Args:
        worker: a function of an importable module.
        root: URL where Ray keeps its own small state; every node must reach it.

    Raises:
        WorkFailed: a rank failed more often than allowed. KeyboardInterrupt: the job was stopped.
    """
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
    context = get_context()
    device = get_device()
    if device.type == "cpu":
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        torch.set_num_threads(max(threads, 1))
    return Rank(context.get_world_rank(), context.get_world_size(), device)


def local_rank() -> int:
    """The calling worker's number on its machine."""
    return int(get_context().get_local_rank())


def report(metrics: dict[str, Any], checkpoint_url: str | None) -> None:
    """Tell Ray of a checkpoint, which its own only names; every rank calls it. Ray keeps metrics only beside one."""
    if checkpoint_url is None:
        ray_report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "portable_checkpoint.txt").write_text(checkpoint_url)
        ray_report(metrics, checkpoint=Checkpoint.from_directory(folder))
