"""jobs/prepare.py through a real `ray job submit`: the cluster prepares onto object storage, the local run agrees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from infra.local.cluster import RAY, Cluster
from tests.support.s3_server import S3Server
from tests.unit.data_prep.videos import make_folders

REPO = Path(__file__).resolve().parents[2]


def test_a_submitted_job_prepares_onto_s3(
    cluster: Cluster, object_store: S3Server, object_prefix: str, tmp_path: Path
) -> None:
    folders = make_folders(tmp_path / "in", classes=2, each=5, frames=20)
    common = ["folder", "--videos", str(folders), "--shard-count", "4"]
    job = [sys.executable, "jobs/prepare.py", *common, "--out", object_prefix]
    done = subprocess.run(
        [RAY, "job", "submit", "--address", cluster.dashboard, "--working-dir", str(REPO), "--", *job],
        env={**os.environ, **cluster.env},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "read 10 = kept 10 + rejected 0" in done.stdout
    subprocess.run(
        [sys.executable, "-m", "data_prep", "shard", *common, "--out", str(tmp_path / "local")],
        cwd=REPO,
        check=True,
        capture_output=True,
        timeout=120,
    )
    ours = {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir() if p.is_file()}
    theirs = object_store.path(object_prefix)
    assert {p.name: p.read_bytes() for p in theirs.iterdir() if p.is_file()} == ours
