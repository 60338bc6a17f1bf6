"""Ranks that fall silent are seen from outside, whatever holds them up; their stacks are kept, and they are ended."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.clock import Clock
from tests.support.ranks import run_ranks
from tests.support.waiting import wait_until
from vswin_dist.device import Rank
from vswin_dist.tracking import NullRun
from vswin_dist.training import hang_watch, hangs, heartbeat
from vswin_dist.training.hang_watch import Report
from vswin_dist.training.hangs import Hang
from vswin_dist.training.heartbeat import FIRST, SLOWEST, Beat, Heartbeat

HANG_S = 1.0


BEATS_S = 2.0


def beat_until_ended(memory: mmap.mmap) -> None:
    """Beat as fast as it goes: each record follows from its number."""
    rank = Heartbeat(1e6, memory)
    while True:
        rank.beat("forward", rank.last.number + 1)


@pytest.mark.slow
def test_a_record_that_is_just_written_is_not_taken_for_another() -> None:
    """Of a part of it, say a limit of 0 s, a rank would be ended that does its work."""
    file = os.memfd_create("heartbeat")
    memory = heartbeat.shared(file)
    writer = multiprocessing.get_context("fork").Process(target=beat_until_ended, args=(memory,), daemon=True)
    writer.start()
    wait_until(lambda: (heartbeat.read(memory) or Beat()).number > 1000)
    found, until = [], time.monotonic() + BEATS_S
    while time.monotonic() < until:
        found.append(heartbeat.read(memory))
    writer.kill()
    writer.join()
    beats = [beat for beat in found if beat is not None]
    numbers = [beat.number for beat in beats]
    assert numbers == sorted(numbers) and len(set(numbers)) > 1000
    assert {beat.phase for beat in beats} == {"forward"} and {beat.limit_s for beat in beats} == {1e6}
    assert all(beat.step == beat.number for beat in beats)
    os.close(file)


@pytest.mark.slow
def test_a_rank_that_is_stopped_while_it_writes_its_record_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 0 was killed by 9"):
        run_ranks(1, hang, str(tmp_path), stop_in_mid_record, timeout_s=120)
    [report] = the_hang(tmp_path).reports
    assert (report.beat.step, report.beat.phase, report.state) == (7, "backward", "T")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_in_mid_record() -> None:
    file, *_ = (fd for fd in range(1024) if "memfd:heartbeat" in os.path.realpath(f"/proc/self/fd/{fd}"))
    time.sleep(2 * hang_watch.LOOK_EVERY_S)  # the whole one is read
    os.pwrite(file, bytes(16), 0)
    stop()


def loop_in_python() -> None:
    while True:
        pass


def sleep_in_c() -> None:
    """Holding the interpreter's lock: no other thread of this process runs."""
    ctypes.PyDLL(None).sleep(1000)


def hang(folder: str, how: Callable[[], None], culprit: int = 0) -> None:
    """Ranks of which one hangs in the backward pass of step 7, and the others wait for it."""
    rank = Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    with hangs.watched(folder, rank, HANG_S) as beats:
        for step in range(6):
            beats.beat("forward", step + 1)
        beats.beat("backward", 7)
        if rank.rank == culprit:
            how()
        rank.barrier()


def the_hang(folder: Path) -> Hang:
    """The only one below `folder`."""
    [start] = (folder / hangs.FOLDER).iterdir()
    found = hangs.read(str(start))
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("how", "state"), [(stop, "T"), (loop_in_python, "R"), (sleep_in_c, "S")])
def test_a_rank_that_hangs_is_ended_and_its_stacks_are_kept(how: Callable[[], None], state: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 0 was killed by 9"):
        run_ranks(1, hang, str(tmp_path), how, timeout_s=120)
    found = the_hang(tmp_path)
    [report] = found.reports
    assert (report.beat.step, report.beat.phase, report.state, report.waits) == (7, "backward", state, False)
    assert report.silent_s >= HANG_S and found.silent == [0]
    text = Path(found.folder, "step-7-rank-0.txt").read_text()
    assert f"{how.__name__} (" in text and "hang (" in text, text


@pytest.mark.slow
def test_the_rank_that_the_others_wait_for_is_named_and_all_stacks_are_kept(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="was killed by 9"):
        run_ranks(2, hang, str(tmp_path), loop_in_python, 1, timeout_s=120)
    found = the_hang(tmp_path)
    assert [r.rank for r in found.reports] == [0, 1] and [r.waits for r in found.reports] == [True, False]
    assert "did not answer: rank 1 on" in str(found) and "in backward of step 7" in str(found)
    assert "barrier (" in Path(found.folder, "step-7-rank-0.txt").read_text()


def killed_among_two(folder: str) -> str:
    """What the rank that is left says when the other one is killed, which is no hang."""
    rank = Rank(dist.get_rank(), 2, torch.device("cpu"))
    try:
        with hangs.watched(folder, rank, 300.0) as beats:
            beats.beat("backward", 3)
            if rank.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            rank.barrier()
    except RuntimeError as error:
        [note] = error.__notes__
        raise AssertionError(f"noted: {note}") from error
    return ""


@pytest.mark.slow
def test_a_collective_that_fails_says_who_did_not_answer(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_ranks(2, killed_among_two, str(tmp_path))
    found = the_hang(tmp_path)
    assert found.silent == [1] and "rank 1 on " in str(found) and "no word from it" in str(found)
    [report] = found.reports
    assert report.rank == 0 and report.beat.step == 3 and "a collective failed" in report.error


class Files(NullRun):
    """Keeps its artifacts."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, str] = {}

    def artifact(self, path: str, text: str) -> None:
        self.files[path] = text


def report(rank: int, number: int, state: str = "S", waits: bool = True) -> Report:
    return Report(rank, f"node-{rank}", Beat(number, 7, "backward"), state, waits)


def test_reports_become_artifacts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        report(rank, 5 + rank).write(str(tmp_path / hangs.FOLDER / "start"), ["node-0", "node-1"], "the stacks")
    run = Files()
    with hangs.published(str(tmp_path), run):
        pass
    assert sorted(run.files) == ["hang/start/step-7-rank-0.txt", "hang/start/step-7-rank-1.txt"]
    assert "the stacks" in run.files["hang/start/step-7-rank-0.txt"]
    output = capsys.readouterr().out
    assert "did not answer: rank 0 on node-0" in output and output.count("the stacks") == 2
    again = Files()
    hangs.publish(str(tmp_path), again)
    assert not again.files


@pytest.mark.parametrize(
    ("reports", "silent"),
    [
        ([report(0, 9), report(1, 9)], [2]),  # of a node that is gone, nobody reports
        ([report(0, 9), report(1, 9, "T"), report(2, 8)], [1]),
        ([report(0, 9), report(1, 9), report(2, 8)], [2]),
        ([report(0, 9), report(1, 9, "R", waits=False), report(2, 9)], [1]),
        ([report(0, 9), report(1, 9), report(2, 9)], []),
    ],
)
def test_who_did_not_answer(reports: list[Report], silent: list[int]) -> None:
    assert Hang("", ["node"] * 3, reports).silent == silent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def test_slow_steps_are_no_hang(clock: Clock) -> None:
    beats = Heartbeat(10.0)
    assert beats.last.limit_s == FIRST * 10
    for step, seconds in enumerate([500, 1, 30, 1], 1):  # the first compiles
        beats.beat("data", step)
        beats.beat("backward", step)
        clock.now += seconds
    beats.beat("data", 5)
    assert beats.last == Beat(10, 5, "data", SLOWEST * 30)
    for step in range(6, 54):
        beats.beat("data", step)
        clock.now += 1
    assert beats.last.limit_s == SLOWEST * 30
    beats.beat("data", 54)
    assert beats.last.limit_s == 10.0, "it is the slowest of the last fifty"


def test_rounds_of_an_evaluation_and_checkpoints_have_limits_of_their_own(clock: Clock) -> None:
    beats = Heartbeat(10.0)
    for phase, seconds in (("evaluation", 3), ("checkpoint", 70)):
        assert phase in heartbeat.PHASES
        beats.beat(phase, 1)  # type: ignore[arg-type]
        assert beats.last.limit_s == FIRST * 10
        clock.now += seconds
        beats.beat("data", 2)
    beats.beat("evaluation", 2)
    assert beats.last.limit_s == SLOWEST * 3
    beats.beat("checkpoint", 2)
    assert beats.last.limit_s == SLOWEST * 70
    for step in range(3, 60):  # one waits for the one before it, however fast they were
        beats.beat("data", step)
        beats.beat("checkpoint", step)
    assert beats.last.limit_s == FIRST * 10


def test_a_collective_outlasts_the_watch() -> None:
    assert hangs.collective_timeout_s(1.0) == 1800
    assert hangs.collective_timeout_s(3600.0) > FIRST * 3600


def test_without_py_spy_faulthandler_says_the_stacks_even_of_a_stopped_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = os.memfd_create("faults")
    code = f"""
import faulthandler, pathlib, signal, time
faulthandler.register(signal.SIGUSR2, file={faults})
def hang():
    pathlib.Path({str(tmp_path / "ready")!r}).touch()
    while True:
        time.sleep(0.1)
hang()
"""
    monkeypatch.setattr(hang_watch.shutil, "which", lambda *_, **__: None)
    process = subprocess.Popen([sys.executable, "-c", code], pass_fds=(faults,))
    try:
        wait_until((tmp_path / "ready").exists)
        assert "in hang" in hang_watch.stacks(process.pid, faults)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: hang_watch.process_state(process.pid) == "T")
        assert "in hang" in hang_watch.stacks(process.pid, faults)
        assert str(process.pid) in hang_watch.threads(process.pid)
    finally:
        process.kill()
        process.wait()
        os.close(faults)


def test_the_time_in_which_the_watcher_stood_still_is_not_held_against_the_rank() -> None:
    """As where a whole machine is suspended."""
    silence = hang_watch.Silence()
    for now in (100.0, 101.0, 102.0, 4000.0):
        silence.look(Beat(5), now)
    assert silence.seconds == 3.0
    silence.look(Beat(6), 4001.0)
    assert silence.seconds == 0.0
