"""A Ray Train job that runs on as many ranks as the cluster has room for, among the world sizes that fit the batch.

Built on names of Ray that are not public (see the bounds on its version): Ray's own policy would take any number between
two bounds, and would interrupt the ranks at any time to add others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

LEFT = "steps_left"  # the metric that says whether more ranks are worth a restart


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
        """Another size where a rank has just reported a checkpoint and steps are left; else none."""
        self._maybe_send_resource_request()
        reports = [s.training_report for s in worker_group_status.worker_statuses.values() if s.training_report]
        reserved = self._get_reserved_resources()
        if reserved is None or not any(r.checkpoint and r.metrics.get(LEFT, 0) for r in reports):
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
