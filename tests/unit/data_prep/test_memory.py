"""A video that takes more memory than its worker may have is a reject; the work goes on, and so does the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_prep import memory
from data_prep.cli import main
from data_prep.executor import LocalExecutor, Task
from data_prep.sources.folder import FolderSource
from tests.unit.data_prep.inprocess import COPY, prepare
from tests.unit.data_prep.test_executor import double
from tests.unit.data_prep.videos import make_folders

LIMIT = 100_000_000


def make_monster(path: Path, side: int = 8000) -> None:
    """Write two frames of one colour: 0.3 MB as a file, 128 MB decoded."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = side, side, "gray"
        frame = av.VideoFrame(side, side, "gray")
        np.frombuffer(frame.planes[0], np.uint8)[:] = 9  # type: ignore[call-overload] # it has a buffer
        for number in range(2):
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.slow
def test_a_video_too_large_for_its_worker_is_rejected(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "in", classes=1, each=3, frames=4)
    make_monster(root / "class 0" / "monster.mov")
    with LocalExecutor(1, LIMIT) as pool:
        manifest = prepare(FolderSource(str(root)), tmp_path / "out", COPY, executor=pool)
    assert manifest.counts == {"read": 4, "kept": 3, "rejected": 1, "reasons": {"crashed": 1}}
    reject = manifest.rejected[0]
    assert reject.source_id == "class 0/monster.mov"
    assert reject.detail == "it takes more than 100 MB of memory, which is what a worker may have (--worker-memory)"


def hold(size: int) -> int:
    """Take `size` bytes, for as long as it takes to be seen."""
    block = np.ones(size, np.uint8)
    time.sleep(20 * memory.POLL_S)
    return int(block[-1])


@pytest.mark.slow
def test_what_stays_below_the_bound_is_left_alone_and_shared_memory_does_not_count(tmp_path: Path) -> None:
    with LocalExecutor(1, LIMIT) as pool:
        pids = pool.pids
        assert [done.value for done in pool.run([Task(0, hold, LIMIT // 4)])] == [1] and pool.pids == pids
        assert [bool(done.crashed) for done in pool.run([Task(1, hold, 2 * LIMIT)])] == [True] and pool.pids != pids
        assert [done.value for done in pool.run([Task(2, double, 2)])] == [4], "another worker goes on"
    (tmp_path / "large").write_bytes(bytes(50_000_000))
    mapped = np.memmap(tmp_path / "large", np.uint8, "r")
    before = memory.taken_by(os.getpid())
    assert mapped.sum() == 0 and memory.taken_by(os.getpid()) - before < 10_000_000
    assert memory.taken_by(2**22 + 1) == 0, "no such process"


def test_workers_share_the_machine_or_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.machine_bytes()
    assert machine > 1 << 28 and memory.part_of(4) == int(0.8 * machine / 4)
    monkeypatch.setattr(memory, "LIMITS", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.machine_bytes() == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.machine_bytes() >= machine


def test_the_option_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, wrong in (("10MB", "must be at least 64MiB, not 10MB"), ("x", "'x' is not a size")):
        assert main(["shard", "folder", "--videos", str(tmp_path), "--out", str(tmp_path), "--worker-memory", text]) == 2
        assert wrong in capsys.readouterr().err


@pytest.mark.slow
def test_a_task_on_ray_ends_its_own_process(tmp_path: Path) -> None:
    code = (
        "import sys; from data_prep.ray_executor import _call; from tests.unit.data_prep.test_memory import hold; "
        "print(_call(int(sys.argv[1]), hold, int(sys.argv[1]) // 4), flush=True); "
        "print(_call(int(sys.argv[1]), hold, int(sys.argv[1]) * 2), flush=True)"
    )
    limit = str(5 * LIMIT)  # Ray itself takes some
    done = subprocess.run([sys.executable, "-c", code, limit], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "1\n"), done.stderr
