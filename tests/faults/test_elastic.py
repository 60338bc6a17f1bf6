"""A training between two numbers of ranks takes what the cluster has room for, among those that divide its batch."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local.cluster import RAY, Cluster, end_process, free_ports, local_cluster
from tests.faults.test_resume import committed
from tests.support.line import SMALL, Line
from tests.support.waiting import wait_until
from vswin_dist.training import checkpoint

# A rate at which sums in another order stay small differences over a hundred steps; another sample shows as 1e-2.
LONG = ("training.epochs=1000", "evaluation.every_epochs=1000", "training.checkpoint_every=3", "training.zero_stage=2",
        "optim.lr=1e-4")
ELASTIC = ("training.workers=4", "training.min_workers=1", "training.micro_batch=4")  # 1, 2 or 4 divide 16
IN_TIME = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15", "RAY_DEDUP_LOGS": "0"}


@contextlib.contextmanager
def node(cluster: Cluster, cpus: int) -> Iterator[None]:
    """One more node of `cluster`, gone when the block is left."""
    agent, grpc = free_ports(2)
    process = subprocess.Popen(
        [RAY, "start", "--address", cluster.address, "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1",
         f"--num-cpus={cpus}", f"--object-store-memory={128 << 20}", f"--dashboard-agent-listen-port={agent}",
         f"--dashboard-agent-grpc-port={grpc}"],
        env={**os.environ, **cluster.env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        end_process(process, grace_s=0)


def newest(line: Line) -> int:
    """The step of the newest checkpoint."""
    return max(int(p.parent.name[5:]) for p in (line.home / "runs" / "elastic").glob(f"*/step-*/{checkpoint.COMMIT}"))


def sizes(log: Path) -> list[int]:
    """The numbers of ranks that the training was started with, one after the other.

    Ray prints a line once for each node that has joined by then, since here they are all on one machine.
    """
    started = {pid: int(ranks) for pid, ranks in re.findall(r"pid=(\d+)\).*; (\d) ranks x", log.read_text())}
    return list(started.values())


@pytest.mark.slow
def test_nodes_go_and_come(line: Line, tmp_path: Path) -> None:
    """Room for three ranks, and two are taken; their node dies, one rank has room; another node joins."""
    log = tmp_path / "log"
    with local_cluster(1, env=IN_TIME) as cluster, contextlib.ExitStack() as stack:
        line.env |= cluster.env | IN_TIME | {"RAY_ADDRESS": cluster.address}
        with node(cluster, 2):
            process = line.start("train", "--recipe", "demo", "run.name=elastic", *line.sets(), *SMALL, *LONG, *ELASTIC,
                                 output=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            wait_until(lambda: committed(line.home, "elastic", 6), process)
        wait_until(lambda: sizes(log) == [2, 1], process, 180)
        with node(cluster, 2):
            wait_until(lambda: sizes(log) == [2, 1, 2], process, 180)
            steps = newest(line) + 6
            wait_until(lambda: committed(line.home, "elastic", steps), process)
            process.terminate()
            assert process.wait(60) == 130, log.read_text()[-5000:]
    line.env = {}
    line.train("whole", *LONG, f"training.max_steps={steps}")
    losses, wanted = line.losses("elastic"), line.losses("whole")
    assert {step: losses[step] for step in wanted} == pytest.approx(wanted, abs=1e-5)
