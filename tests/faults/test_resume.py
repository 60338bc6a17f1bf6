"""A training that is killed and submitted again goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.support.line import SMALL, Line, short_folder
from tests.support.waiting import wait_until
from vswin_dist.training import checkpoint

EVERY_STEP = ("training.checkpoint_every=1", "training.epochs=4", "training.zero_stage=2")
STEPS = 12


def committed(home: Path, name: str, step: int) -> bool:
    return any((home / "runs" / name).glob(f"*/step-{step:08d}/{checkpoint.COMMIT}"))


def end_family(family: list[psutil.Process]) -> None:
    """The ranks end with their driver, by themselves; Ray's agents, which take a minute to notice, are ended here."""
    ranks = [p for p in family if is_rank(p)]
    _, alive = psutil.wait_procs(ranks, timeout=30)
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()
    psutil.wait_procs(family, timeout=10)
    assert ranks and not alive, f"outlived their driver: {alive}"


def is_rank(process: psutil.Process) -> bool:
    try:
        return any("RayTrainWorker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, motion_shards: Path) -> dict[int, float]:
    with short_folder() as ray_folder:
        line = Line(tmp_path_factory.mktemp("undisturbed"), motion_shards, ray_folder)
        line.train("whole", *EVERY_STEP)
        return line.losses("whole")


@pytest.mark.parametrize("ranks_afterwards", [2, 1])
def test_sigkill_and_the_same_command_again(line: Line, undisturbed: dict[int, float], ranks_afterwards: int) -> None:
    process = line.start("train", "--recipe", "demo", "run.name=cut", *line.sets(), *SMALL, *EVERY_STEP)
    try:
        wait_until(lambda: committed(line.home, "cut", 5), process)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    end_family(family)
    assert len(line.losses("cut")) < STEPS

    output = line.train("cut", *EVERY_STEP, f"training.workers={ranks_afterwards}")
    assert "resumed from" in output
    losses = line.losses("cut")
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(undisturbed, abs=1e-5)

    refused = line.train("cut", *EVERY_STEP, code=2)
    assert "the training 'cut' is finished" in refused
    refused = line.train("cut", *EVERY_STEP, "optim.lr=0.5", "training.epochs=8", code=2)
    assert "is finished" in refused or "optim.lr: 0.001 -> 0.5" in refused


def test_a_killed_rank_is_restarted_within_the_submission(line: Line, undisturbed: dict[int, float]) -> None:
    process = line.start("train", "--recipe", "demo", "run.name=rank", *line.sets(), *SMALL, *EVERY_STEP)
    try:
        wait_until(lambda: committed(line.home, "rank", 4), process)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if is_rank(p)]
        assert len(ranks) == 2, ranks
        ranks[-1].kill()
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output[-5000:]
    assert "resumed from" in output
    assert line.losses("rank") == pytest.approx(undisturbed, abs=1e-5)


def test_a_stopped_job_ends_its_ranks_and_its_run(line: Line) -> None:
    """SIGTERM is what `ray job stop` and a batch system send."""
    process = line.start("train", "--recipe", "demo", "run.name=stopped", *line.sets(), *SMALL, *EVERY_STEP,
                         "training.epochs=400")
    try:
        wait_until(lambda: committed(line.home, "stopped", 2), process)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if is_rank(p)]
        process.terminate()
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and output.splitlines()[-1] == "error: interrupted", output[-3000:]
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    assert line.run_of("stopped").info.status == "KILLED"
