"""What a host of a cluster does for its container's end and health, on a real Ray head that asks for a token."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
from ray.job_submission import JobStatus, JobSubmissionClient

from infra.local.cluster import Cluster
from tests.support.commands import ROOT
from tests.support.waiting import wait_until

MARK = "VSWIN_TEST_SESSION"  # of tests/conftest.py: the processes of these tests
JOB = """
import signal, time
def end(*_):
    print("a checkpoint is written", flush=True)
    raise SystemExit(130)
signal.signal(signal.SIGTERM, end)
print("at work", flush=True)
time.sleep(300)
"""


def program(cluster: Cluster, name: str, *arguments: str, token: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program of infra/docker to its end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | (cluster.env if token else {})
    command = [sys.executable, str(ROOT / "infra/docker" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_the_jobs_of_a_head_are_stopped_in_order(cluster: Cluster, tmp_path: Path) -> None:
    client = JobSubmissionClient(cluster.dashboard, headers={"Authorization": f"Bearer {cluster.env['RAY_AUTH_TOKEN']}"})
    (tmp_path / "job.py").write_text(JOB)
    job = tmp_path.name  # another at a second try

    def submitted() -> bool:
        with contextlib.suppress(RuntimeError):  # the head has no agent yet
            client.submit_job(entrypoint=f"{sys.executable} {tmp_path / 'job.py'}", submission_id=job)
            return True
        return False

    wait_until(submitted)
    wait_until(lambda: "at work" in client.get_job_logs(job))
    stop = ("stop_jobs.py", "--dashboard", cluster.dashboard, "--within", "60")
    refused = program(cluster, *stop, token=False)
    assert refused.returncode == 1 and "401" in refused.stdout
    assert client.get_job_status(job) == JobStatus.RUNNING
    done = program(cluster, *stop)
    assert (done.returncode, done.stdout) == (0, f"stopping {job}\n"), done.stderr
    assert client.get_job_status(job) == JobStatus.STOPPED
    assert "a checkpoint is written" in client.get_job_logs(job)
    assert program(cluster, *stop).stdout == ""


def test_the_health_check_asks_rays_agent_without_a_token(cluster: Cluster) -> None:
    ports = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            raylet = process.parent()  # the agent's title stands where its environment was
            if raylet and "ray::DashboardAgent" in process.cmdline()[0] and raylet.environ().get(MARK) == os.environ[MARK]:
                ports |= {c.laddr.port for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    answers = [program(cluster, "health.py", "--port", str(port), token=False) for port in ports]
    assert ["success" in a.stdout for a in answers if a.returncode == 0] == [True]
