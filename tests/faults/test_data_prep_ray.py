"""data-prep on a real Ray of this machine gives the bytes of the local run; a killed Ray worker changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data_prep.videos import make_folders

pytest.importorskip("ray")
REPO = Path(__file__).resolve().parents[2]

DRIVER = """
import contextlib, os, signal, sys, threading, time
from pathlib import Path
import psutil
from data_prep.cli import main
from tests.support.waiting import below

def kill_one():
    while True:
        time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "_call" in " ".join(process.cmdline()) and below(Path(sys.argv[1]), "0*"):
                    process.send_signal(signal.SIGKILL)
                    print("killed a worker", flush=True)
                    return

if __name__ == "__main__":
    threading.Thread(target=kill_one, daemon=True).start()
    sys.exit(main(sys.argv[2:]))
"""


def test_the_same_bytes_on_ray_although_a_worker_dies(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "in", classes=2, each=10, frames=40)
    common = ["shard", "folder", "--videos", str(folders), "--shard-count", "6"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPO)}
    subprocess.run(
        [sys.executable, "-m", "data_prep", *common, "--out", str(tmp_path / "local")],
        cwd=REPO,
        check=True,
        capture_output=True,
        timeout=120,
    )
    staging = tmp_path / "work"
    staging.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            DRIVER,
            str(staging),
            *common,
            "--out",
            str(tmp_path / "ray"),
            "--ray",
            "local",
            "--workers",
            "2",
            "--work",
            str(staging),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {p.name: p.read_bytes() for p in (tmp_path / "local").iterdir() if p.is_file()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "ray").iterdir() if p.is_file()} == files
    assert "killed a worker" in done.stdout
