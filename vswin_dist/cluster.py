"""Run ranks on a Ray cluster, on as many of its machines as it has room for. The only module here that imports Ray Train."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from vswin_dist import local_files, storage
from vswin_dist.device import STEPS_LEFT, Rank
from vswin_dist.errors import PreflightError, RanksFailed, heed_interrupts

os.environ["HOME"] = str(local_files.user_home())  # Ray asks for a home folder, from its import on; its processes inherit it

import ray
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    get_context,
)
from ray.train import report as ray_report
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")
LEAVES_WITHIN_S = 15.0  # a node that does not answer and is ended on purpose is no member any more

# Ray Train hands these on to the ranks. The first bounds how late a dead rank is seen; without the second, what a rank
# prints appears twice.
WORKER_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each start of the ranks, whose notices nothing here reads
}


@dataclass(frozen=True)
class Resources:
    """What the ranks of a Ray Train job get."""

    world_sizes: tuple[int, ...]  # numbers of ranks that it may run on, ascending; the cluster's room decides between them
    use_gpu: bool
    cpus_per_worker: float
    max_failures: int
    timeout_s: int = 1800  # of a collective


@contextmanager
def joined() -> Iterator[None]:
    """Join the Ray cluster of `RAY_ADDRESS` or of this job; without one, start Ray on this machine, and end it."""
    os.environ.update(WORKER_ENV)
    mine = not ray.is_initialized()
    if mine:
        address = os.environ.get("RAY_ADDRESS", "local")
        # The dashboard's ten processes take a sixth of a short training's processor time, for a Ray that ends with this job.
        ray.init(address=address, log_to_driver=True, include_dashboard=False if address == "local" else None)
        # `ray job stop` and batch systems send SIGTERM. Ray's handler of it aborts the process; that of SIGINT is orderly.
        heed_interrupts()
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        if mine:
            ray.shutdown()


def check_resources(resources: Resources, setting: str) -> None:
    """Refuse more ranks, as `setting` says, than an idle cluster has room for.

    Raises:
        PreflightError: fewer CPUs or GPUs than asked for; names `setting`.
    """
    have = ray.cluster_resources()
    for kind, amount in _needed(resources).items():
        if have.get(kind, 0) < amount:
            raise PreflightError(
                f"{setting}={resources.world_sizes[0]} needs {amount:g} {kind}s, the Ray cluster has "
                f"{have.get(kind, 0):g}. Lower {setting}, or add nodes."
            )


def _needed(resources: Resources) -> dict[str, float]:
    least = resources.world_sizes[0]
    return {"CPU": least * resources.cpus_per_worker} | ({"GPU": float(least)} if resources.use_gpu else {})


def room(resources: Resources) -> int:
    """Count the jobs of this size that an idle cluster has room for at a time, at least one."""
    have = ray.cluster_resources()
    return max(1, min(int(have.get(kind, 0) // amount) for kind, amount in _needed(resources).items()))


def address() -> str:
    """Return what `RAY_ADDRESS` must be for another driver to join the cluster that this one has joined."""
    return str(ray.get_runtime_context().gcs_address)


def on_every_node(function: Callable[..., T], *args: Any, timeout_s: float = 120) -> list[tuple[T, float, float]]:
    """Call `function(*args)` on each node that can hold ranks; its results with the times of sending and of receiving.

    A node that leaves the cluster meanwhile, as an idle one that an autoscaler ends, is passed over with a line.

    Raises:
        PreflightError: a node that stays does not answer in time, or cannot import the function; names it. Or all left.
    """
    called = []
    for node in ray.nodes():
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU")):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=there)
            called.append((node, time.time(), remote.remote(*args)))
    found = []
    for node, sent, reference in called:
        address = node["NodeManagerAddress"]
        try:
            found.append((ray.get(reference, timeout=timeout_s), sent, time.time()))
        except ray.exceptions.RayError as error:
            if not isinstance(error, ray.exceptions.RayTaskError) and _has_left(node["NodeID"]):
                print(f"the node {address} left the cluster while it was asked; goes on without it", flush=True)
                continue
            cause = str(error).strip().splitlines() or [type(error).__name__]
            raise PreflightError(f"the node {address} does not answer, or not as it should: {cause[-1]}") from error
    if called and not found:
        raise PreflightError("every node with room for ranks left the cluster meanwhile. Start again once some are back")
    return found


def _has_left(node: str) -> bool:
    """Return True where the node is no member any more, or will be none within `LEAVES_WITHIN_S`."""
    end = time.monotonic() + LEAVES_WITHIN_S
    while any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


class FittingWorldSizes(ElasticScalingPolicy):
    """Take the largest of `world_sizes` that the cluster has room for, and grow just after a checkpoint was saved.

    When ranks are lost, Ray restarts the job, and asks for its size then.
    """

    def __init__(self, scaling_config: ScalingConfig, world_sizes: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.world_sizes = sorted(world_sizes)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # What is reserved is looked at every 20 s; ranks asked of a node that died since are waited for in vain.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        room = super()._count_possible_workers({n: r for n, r in reserved_resources.items() if n in alive})
        return max((size for size in self.world_sizes if size <= room), default=0)

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Another size where a rank has just reported a checkpoint and steps are left; else none.

        What is redone are the steps since that checkpoint: those for which it was written in the background.
        """
        self._maybe_send_resource_request()
        reports = [s.training_report for s in worker_group_status.worker_statuses.values() if s.training_report]
        reserved = self._get_reserved_resources()
        if reserved is None or not any(r.checkpoint and r.metrics.get(STEPS_LEFT, 0) for r in reports):
            return NoopDecision()
        size = self._count_possible_workers(reserved)
        return self._get_resize_decision(size) if size > worker_group_state.num_workers else NoopDecision()


class FittingTrainer(TorchTrainer):
    """`TorchTrainer` that runs on one of `world_sizes` where its `ScalingConfig` gives a range of workers.

    It starts no process for Ray's datasets, of which there are none, and no detached one to free what ranks held when their
    controller died: Ray does so at the end of the driver, which that death ends. That process asks every second whether the
    controller lives, but the first Ray cluster that it finds on its machine, which may be another one.
    """

    UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)

    def __init__(self, *args: Any, world_sizes: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world_sizes = world_sizes

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, self.UNUSED)]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        # Ray has the controller start this process, on the same node, give it five seconds with its imports, and print a
        # traceback where these take longer. It starts beside the controller instead.
        get_or_create_autoscaling_coordinator()
        if self.scaling_config.elasticity_enabled:
            kwargs["scaling_policy"] = FittingWorldSizes(self.scaling_config, self.world_sizes)
        return super()._initialize_and_run_controller(**kwargs)


def run_ranks(
    worker: Callable[[dict[str, Any]], None], config: dict[str, Any], resources: Resources, name: str, root: str
) -> dict[str, Any]:
    """Run `worker(config)` on every rank with torch.distributed up; returns the metrics that were reported last.

    Args:
        worker: a function of an importable module.
        root: URL where Ray keeps its own small state; every node must reach it.

    Raises:
        RanksFailed: a rank failed more often than allowed, or Ray's head is gone. KeyboardInterrupt: the job was stopped.
    """
    least, most = resources.world_sizes[0], resources.world_sizes[-1]
    path, filesystem = _ray_storage(storage.join(root, "ray"))
    each = {"CPU": resources.cpus_per_worker} | ({"GPU": 1} if resources.use_gpu else {})
    trainer = FittingTrainer(
        worker,
        train_loop_config=config,
        world_sizes=resources.world_sizes,
        scaling_config=ScalingConfig(
            num_workers=(least, most) if least < most else most, use_gpu=resources.use_gpu, resources_per_worker=each
        ),
        torch_config=TorchConfig(backend=None, timeout_s=resources.timeout_s),
        run_config=RunConfig(
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        return dict(trainer.fit().metrics or {})
    except SystemExit as stop:  # how Ray answers SIGINT, with exit code 0
        raise KeyboardInterrupt from stop
    except Exception as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        # What fails within ranks is no error of an actor here: that is the controller, whose node or head is gone.
        away = isinstance(error, ray.exceptions.RayActorError)
        what = "Ray's head, or the node of its training controller, does not answer" if away else "a worker failed"
        raise RanksFailed(f"{name}: {what}: {cause[-1]} (full trace above)") from error
    finally:
        # Ray leaves its own handler behind, which passes over two signals and ends with exit code 0 at the third.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)


def _ray_storage(url: str) -> tuple[str, Any]:
    """(path, pyarrow file system or None) for Ray: its own S3 client fails against other endpoints than AWS."""
    if storage.is_local(url):
        return url, None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = storage.filesystem(url)
    return path, PyFileSystem(FSSpecHandler(filesystem))


def this_rank() -> Rank:
    """Return the calling Ray Train worker's rank, world size and device."""
    context = get_context()
    device = get_device()
    if device.type == "cpu":
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        torch.set_num_threads(max(threads, 1))
    return Rank(context.get_world_rank(), context.get_world_size(), device)


def local_rank() -> int:
    """Return the calling worker's rank on its machine."""
    return int(get_context().get_local_rank())


def gauge(name: str, text: str, tags: dict[str, str]) -> Callable[[float], None]:
    """Make a gauge that Prometheus finds as `ray_NAME` at this node's agent; returns what sets it."""
    set_value: Callable[[float], None] = Gauge(name, text, tuple(tags)).set_default_tags(tags).set
    return set_value


def counter(name: str, text: str, tags: dict[str, str]) -> Callable[[float], None]:
    """Make a counter that Prometheus finds as `ray_NAME_total` at this node's agent; returns what adds to it."""
    add: Callable[[float], None] = Counter(name, text, tuple(tags)).set_default_tags(tags).inc
    return add


def report(metrics: dict[str, Any], checkpoint_url: str | None) -> None:
    """Tell Ray of a checkpoint, which its own only names; every rank calls it. Ray keeps metrics only beside one.

    Ray writes its own in the background, after those that were reported before.
    """
    if checkpoint_url is None:
        ray_report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        return
    folder = Path(tempfile.mkdtemp())
    (folder / "portable_checkpoint.txt").write_text(checkpoint_url)
    ray_report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )
