"""The processes that read a rank's data: none outlives it, and none imports its main module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

RANK = """
import sys
import torch
from vswin_dist.config import load_settings
from vswin_dist.data.loader import TrainLoader
from vswin_dist.data.plan import make_plan
from vswin_dist.device import Rank
from vswin_dist.manifest import read_manifest

print(__name__, flush=True)
if __name__ == "__main__":
    data = load_settings("demo", [f"data.train={sys.argv[1]}", "data.workers=2"]).data
    manifest = read_manifest(data.train)
    plan = make_plan(manifest, data, 0, 13)
    batches = iter(TrainLoader(manifest, data, plan, Rank(0, 1, torch.device("cpu")), 13, 10**6))
    next(batches), next(batches)
    print("at work", flush=True)
    for _ in batches:
        pass
"""


def test_sigkill_ends_the_workers_and_their_forkserver(tmp_path: Path, motion_shards: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen([sys.executable, str(script), str(motion_shards / "train")], stdout=subprocess.PIPE, text=True)
    assert rank.stdout
    with rank.stdout:
        said = [rank.stdout.readline(), rank.stdout.readline()]
    family = psutil.Process(rank.pid).children(recursive=True)
    rank.kill()
    rank.wait()
    _, left = psutil.wait_procs(family, timeout=60)
    for process in left:
        process.kill()
    assert said == ["__main__\n", "at work\n"], "a worker imports the main module as __mp_main__"
    assert len(family) >= 4, "two workers, their forkserver and the resource tracker"
    assert not left, f"outlived their rank: {left}"
