"""A dry run on real nodes: every row of its table, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.line import REPOSITORY, SMALL, Line

LEAVES = """
import threading, time
import ray
from ray.cluster_utils import Cluster
from vswin_dist.cluster import on_every_node
from vswin_dist.errors import PreflightError

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
stays, goes = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)

def asked(seconds):
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()

def broken():
    raise ValueError("broken there")

assert {answer for answer, *_ in on_every_node(asked, 0)} == {stays.node_id, goes.node_id}
began = time.monotonic()
try:
    on_every_node(broken)
except PreflightError as error:
    assert "does not answer, or not as it should: ValueError: broken there" in str(error), error
    assert time.monotonic() - began < 10, "nobody waits for a node that answered"
else:
    raise AssertionError("what a node answered with an error is refused")
threading.Timer(3, cluster.remove_node, (goes,)).start()
print([answer for answer, *_ in on_every_node(asked, 12)] == [stays.node_id])
threading.Timer(3, cluster.remove_node, (stays,)).start()
try:
    on_every_node(asked, 12)
except PreflightError as error:
    print(error)
ray.shutdown()
cluster.shutdown()
"""


def test_a_dry_run_looks_at_the_cluster_and_writes_nothing(cluster_line: Line) -> None:
    line = cluster_line
    line.without_store()
    output = line.run("train", "--recipe", "demo", "--dry-run", "run.name=dry", *line.sets(), *SMALL, "data.workers=1")
    rows = [text.split(" | ") for text in output.splitlines() if text.startswith("| ")]
    states = {row[0].removeprefix("| "): row[1] for row in rows}
    assert states["all-reduce of 2 ranks"] == states["versions"] == states["storage"] == states["clocks"] == "ok"
    assert any(what.startswith("memory of ") for what in states) and any(w.startswith("shared memory of") for w in states)
    assert not list((line.home / "runs").glob("dry/*")) and not list((line.home / "mlflow").glob("*.db"))
    more = ("run.name=dry", *line.sets(), *SMALL, "training.workers=8", "training.micro_batch=1")
    refused = line.run("train", "--recipe", "demo", "--dry-run", *more, code=2)
    assert "the Ray cluster has 2" in refused


def test_a_node_that_leaves_while_it_is_asked_is_no_error() -> None:
    """As an idle one that an autoscaler ends."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=180
    )
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left the cluster while it was asked; goes on without it" in said[0] and said[1] == "True"
    assert "every node with room for ranks left the cluster" in said[-1]
