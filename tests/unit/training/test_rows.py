"""Rows of an ablation side by side, by real processes; that they join one Ray cluster is tested with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from vswin_dist.training import paper
from vswin_dist.training.rows import InOrder, Rows

# Notes when it begins and ends, takes a signal as a training does, and fails where its rate says so.
JOB = """
import os, signal, sys, time
name = next(a for a in sys.argv if a.startswith("run.name="))
def note(what):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{what} {name}\\n")
def stop(*_):
    note("stopped")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
note("began")
print("at", os.environ["RAY_ADDRESS"], sys.argv[-1], flush=True)
time.sleep(float(os.environ["SECONDS"]))
note("ended")
sys.exit("optim.lr=0.5" in sys.argv)
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Rows, list[paper.Trial]]:
    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    labels = [f"{n}:optim.lr={lr}" for n, lr in (("a", 0.1), ("b", 0.5), ("c", 0.2))]
    return Rows(tmp_path / "job.py", "parent1"), paper.plan_own("demo", ["a", "b", "c"], "mine", ["data.train=/x", *labels])


def notes(tmp_path: Path) -> list[str]:
    path = tmp_path / "notes"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_so_many_train_at_a_time_and_one_that_fails_stops_no_other(
    rows: tuple[Rows, list[paper.Trial]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECONDS", "1")
    started, trials = rows
    assert started.train_at("ray:1", InOrder(trials), 2) == ["b"]
    running = most = 0
    for what in (note.split()[0] for note in notes(tmp_path)):
        running += 1 if what == "began" else -1
        most = max(most, running)
    assert most == 2 and len(notes(tmp_path)) == 6
    assert sorted(capsys.readouterr().out.splitlines()) == [f"{n} | at ray:1 tracking.parent=parent1" for n in "abc"]


def test_an_interrupt_stops_those_that_train_once_and_waits_for_them(
    rows: tuple[Rows, list[paper.Trial]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS", "60")

    def interrupt() -> None:
        while len(notes(tmp_path)) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    started, trials = rows
    with pytest.raises(KeyboardInterrupt):
        started.train_at("ray:1", InOrder(trials), 2)
    assert sorted(notes(tmp_path)) == [f"{what} run.name=mine_{n}" for what in ("began", "stopped") for n in "ab"]
