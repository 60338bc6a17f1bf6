"""What Grafana's dashboard asks, asked of a real Prometheus that scrapes a real training's ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.local.cluster import Cluster
from tests.support.line import SMALL, Line
from tests.support.ports import free_port
from tests.support.waiting import start_server, wait_until

DASHBOARD = Path(__file__).parents[2] / "infra/grafana/trainings.json"
METRICS_PORT = "import ray; ray.init(log_to_driver=False); print(ray.nodes()[0]['MetricsExportPort'])"
SETTINGS = (
    "training.epochs=400",
    "training.max_steps=120",
    "training.checkpoint_every=10",
    "evaluation.every_epochs=400",
)


class Prometheus:
    """A server that scrapes one port each second."""

    def __init__(self, folder: Path, scraped: int) -> None:
        self.folder, self.port = folder, 0
        scrape = {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{scraped}"]}]}
        (folder / "prometheus.yml").write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}))
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> subprocess.Popen[bytes]:
        self.port = free_port()
        where = [f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data"]
        with (self.folder / "log").open("ab") as log:
            command = ["prometheus", *where, f"--web.listen-address=127.0.0.1:{self.port}"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        return self.process

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    def ask(self, path: str, **parameters: str) -> list[dict]:
        """The data of an answer of its API; fails where it does not take the query."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            said = json.load(answer)
        assert said["status"] == "success", said
        return said["data"]["result"] if path == "query" else said["data"]


@contextmanager
def prometheus(folder: Path, scraped: int) -> Iterator[Prometheus]:
    folder.mkdir()
    server = Prometheus(folder, scraped)
    start_server(server.launch, server.ready, server.stop, folder / "log")
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian's prometheus)")
def test_every_panel_shows_a_training(cluster_line: Line, cluster: Cluster, tmp_path: Path) -> None:
    board = json.loads(DASHBOARD.read_text())
    panels = [target["expr"].replace("$run", "shown") for panel in board["panels"] for target in panel["targets"]]
    environment = {**os.environ, **cluster.env, "RAY_ADDRESS": cluster.address}
    port = subprocess.run([sys.executable, "-c", METRICS_PORT], env=environment, capture_output=True, text=True, check=True)
    with prometheus(tmp_path / "prometheus", int(port.stdout)) as server:
        found: dict[str, list[dict]] = {}

        def all_answer() -> bool:
            found.update({expression: server.ask("query", query=expression) for expression in panels})
            return all(found.values())

        training = ("--recipe", "demo", "run.name=shown", *cluster_line.sets(), *SMALL, *SETTINGS)
        with cluster_line.running("train", *training, output=cluster_line.home / "log") as process:
            wait_until(all_answer, process)
            assert process.wait(400) == 0
        for expression, rows in found.items():
            assert {row["metric"].get("run") for row in rows} == {"shown"}, expression
        [topk] = [rows for expression, rows in found.items() if expression.startswith("topk")]
        assert {row["metric"]["rank"] for row in topk} == {"0", "1"}
        assert "shown" in server.ask("label/run/values")

        told = cluster_line.history("shown", "train/clips_per_second")
        rate = server.ask("query", query='max_over_time(sum by (run) (ray_vswin_clips_per_second{run="shown"})[10m:1s])')
        read = server.ask("query", query='max_over_time(ray_vswin_read_bytes_total{run="shown"}[10m])')
    assert min(told.values()) * 0.9 <= float(rate[0]["value"][1]) <= max(told.values()) * 1.1
    by_rank = {row["metric"]["rank"]: float(row["value"][1]) for row in read}
    logged = cluster_line.history(
        "shown", "data/bytes_read"
    )  # of rank 0, so far; Ray's agent has those of up to 10 s before
    assert by_rank.keys() == {"0", "1"} and by_rank["0"] in logged.values(), (by_rank, logged)
