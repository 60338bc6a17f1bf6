"""Look at a cluster before a training starts there, and try a collective of all its ranks."""

from __future__ import annotations

import sys
import time
import uuid
from typing import Any

import torch
import torch.distributed as dist

from vswin_dist import cluster, storage
from vswin_dist.cluster import Resources
from vswin_dist.errors import WorkFailed
from vswin_dist.training import hangs, node_checks, node_facts
from vswin_dist.training.node_checks import Check
from vswin_dist.training.spec import TrainingSpec

PROBE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
TIMES = 5


def resources_of(spec: TrainingSpec) -> Resources:
    """Return what the ranks of `spec` get."""
    t = spec.settings.training
    timeout_s = hangs.collective_timeout_s(t.hang_s)
    return Resources(tuple(spec.world_sizes), t.use_gpu, t.cpus_per_worker, t.max_failures, timeout_s)


def check_cluster(spec: TrainingSpec) -> list[Check]:
    """Look at every node of the cluster that this process has joined.

    Raises:
        PreflightError: the cluster is too small, or a node does not answer.
    """
    t = spec.settings.training
    cluster.check_resources(resources_of(spec), "training.min_workers" if t.min_workers else "training.workers")
    answers = cluster.on_every_node(node_facts.look_around, spec.root, spec.settings.storage.s3_endpoint)
    nodes = [(facts, max(sent - facts.clock, facts.clock - received, 0.0)) for facts, sent, received in answers]
    return node_checks.check_nodes(spec, nodes)


def check_nodes(spec: TrainingSpec) -> None:
    """Refuse to start on a cluster that cannot hold the training; says what will be tight.

    Raises:
        PreflightError: names what is wrong, and what to do.
    """
    checks = check_cluster(spec)
    if wrong := [c for c in checks if c.state != "ok"]:
        print(node_checks.table(wrong), file=sys.stderr, flush=True)
    node_checks.refuse(checks)


def dry_run(spec: TrainingSpec) -> list[Check]:
    """Check the nodes, and let all ranks sum a tensor; nothing is trained, logged or kept.

    Raises:
        PreflightError: as `check_cluster`.
    """
    with cluster.joined():
        checks = check_cluster(spec)
        if all(c.state != "error" for c in checks):
            checks.append(_collective(spec))
    return checks


def _collective(spec: TrainingSpec) -> Check:
    name = f"all-reduce of {spec.settings.training.workers} ranks"
    place = storage.join(spec.root, f"dry-run-{uuid.uuid4().hex[:8]}")  # of Ray's own state
    try:
        found = cluster.run_ranks(all_reduce, {}, resources_of(spec), "dry-run", place)
    except WorkFailed as error:
        remedy = "see that the nodes reach each other (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        return Check(name, "error", str(error), remedy)
    finally:
        storage.remove(place, recursive=True)
    rate, took, size = found["bytes_per_second"] / 1e9, found["seconds"] * 1e3, found["bytes"] / 2**20
    return Check(name, "ok", f"{rate:.2f} GB/s ({took:.1f} ms for {size:.0f} MiB)")


def all_reduce(config: dict[str, Any]) -> None:
    """Sum a tensor over the ranks, and report what that took; what Ray Train runs on each."""
    rank = cluster.this_rank()
    size = PROBE_BYTES[rank.device.type]
    tensor = torch.ones(size // 4, device=rank.device)
    seconds = []
    for _ in range(TIMES):
        rank.barrier()
        began = time.perf_counter()
        if rank.world_size > 1:
            dist.all_reduce(tensor)
        float(tensor[0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    best = min(seconds)
    sent = 2 * (rank.world_size - 1) / rank.world_size * size
    found = {"bytes": float(size), "seconds": best, "bytes_per_second": sent / best}
    cluster.report(found, "dry-run" if rank.is_main else None)
