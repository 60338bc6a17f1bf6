"""A training between two numbers of ranks takes what the cluster has room for, among those that divide its batch."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.local.cluster import Cluster, end_process, free_ports, local_cluster, start_command
from tests.support import trainers
from tests.support.drill import Drill, record
from tests.support.line import SMALL, Line, own_lines
from tests.support.waiting import start_server, wait_until

# A rate at which sums in another order stay small differences over a hundred steps; another sample shows as 1e-2.
LONG = (
    "training.epochs=1000",
    "evaluation.every_epochs=1000",
    "training.checkpoint_every=3",
    "training.zero_stage=2",
    "optim.lr=1e-4",
)
ELASTIC = ("training.workers=4", "training.min_workers=1", "training.micro_batch=4")  # 1, 2 or 4 divide 16
IN_TIME = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60", "RAY_DEDUP_LOGS": "0"}


@contextlib.contextmanager
def node(cluster: Cluster, cpus: int, log: Path) -> Iterator[None]:
    """One more node of `cluster`, gone when the block is left."""
    processes: list[subprocess.Popen[bytes]] = []

    def launch() -> subprocess.Popen[bytes]:
        agent, grpc = free_ports(2)
        command = [*start_command(cpus, agent, grpc), f"--address={cluster.address}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **cluster.env, "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        processes.append(process)
        return process

    def stop() -> None:
        end_process(processes[-1], grace_s=0)

    start_server(launch, lambda: b"Ray runtime started" in log.read_bytes(), stop, log)
    try:
        yield
    finally:
        stop()


def sizes(log: Path) -> list[int]:
    """The numbers of ranks that the training was started with, one after the other.

    Ray prints a line once for each node that has joined by then, since here they are all on one machine.
    """
    started = {pid: int(ranks) for pid, ranks in re.findall(r"pid=(\d+)\).*; (\d) ranks x", log.read_text())}
    return list(started.values())


def kill_head(cluster: Cluster) -> None:
    """As where the head's machine is lost; the rest of its Ray ends by itself."""
    port = f"--gcs_server_port={cluster.address.rpartition(':')[2]}"
    [head] = [p for p in psutil.Process().children(recursive=True) if port in p.cmdline() and "gcs_server" in p.name()]
    head.kill()


def test_nodes_go_and_come_and_the_head_is_lost(line: Line, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Room for three ranks, and two are taken; their node dies, one rank has room; another node joins; a new head."""
    log = tmp_path / "log"
    drill = Drill(line, "elastic", log)
    command = ("--recipe", "demo", "run.name=elastic", *line.sets(), *SMALL, *LONG, *ELASTIC)
    with local_cluster(1, env=IN_TIME) as cluster, contextlib.ExitStack() as stack:
        line.env |= cluster.env | IN_TIME | {"RAY_ADDRESS": cluster.address}
        with node(cluster, 2, tmp_path / "node.log"):
            process = stack.enter_context(line.running("train", *command, output=log))
            wait_until(lambda: drill.committed() >= 6, process)
            drill.happens("a node is lost with the ranks on it: 2 -> 1 ranks")
        wait_until(lambda: sizes(log) == [2, 1], process, 400)
        with node(cluster, 2, tmp_path / "node.log"):
            drill.happens("a node joins: 1 -> 2 ranks")
            wait_until(lambda: sizes(log) == [2, 1, 2], process, 400)
            before = drill.committed()
            wait_until(lambda: drill.committed() >= before + 6, process)
            drill.happens("the head is lost; the same command on a new one")
            kill_head(cluster)
            assert process.wait(120) == 1, log.read_text()[-5000:]
    ending = "Once that is mended, the same command resumes from the last checkpoint."
    assert own_lines(log.read_text())[-1].endswith(ending), log.read_text()[-5000:]

    steps = drill.committed() + 6
    with local_cluster(2) as cluster:
        line.env |= cluster.env | {"RAY_ADDRESS": cluster.address}
        with log.open("a") as output:
            output.write(line.run("train", *command, f"training.max_steps={steps}"))
    expected = trainers.losses(trainers.train(line, "whole", *LONG, f"training.max_steps={steps}"))
    assert line.losses("elastic") == pytest.approx(expected, abs=1e-5)
    for row in drill.rows(expected):
        record(request, *row)
