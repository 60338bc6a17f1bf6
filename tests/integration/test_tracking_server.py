"""A training's run on a real MLflow server that hangs, dies and comes back."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.mlflow_server import MlflowServer, mlflow_server
from tests.support.waiting import wait_until
from vswin_dist.errors import TrackingError
from vswin_dist.tracking import DatasetRecord, attach, backend, open_run, send_kept

DATASET = DatasetRecord("utd", "0123456789abcdef0123456789abcdef", "s3://shards/utd", "training", {"kept": 3})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as started:
        yield started


def steps(uri: str, run_id: str, name: str) -> list[int]:
    return [m.step for m in backend.client(uri).get_metric_history(run_id, name)]


def processes_of(group: int) -> list[str]:
    """The running processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(stat.parent.name)
    return found


def test_one_run_over_a_resubmission_with_its_files_on_the_server(server: MlflowServer) -> None:
    run_id = open_run(server.uri, "exp", "one").id
    for start in range(2):  # submitted, ended, and submitted again
        run = open_run(server.uri, "exp", "one", run_id)
        assert run.id == run_id
        number = run.start(
            settings={"lr": start},
            recipe="optim.lr: 0\n",
            source="abc",
            world_size=2,
            datasets=[DATASET],
            files={"parameter_groups.md": "| group |\n"},
        )
        assert number == start
        for step in range(start * 3, start * 3 + 5):
            run.log(step, {"loss": 1.0, "diverged": float("nan")})
        assert run.close() == 0
        assert run.end("FINISHED" if start else "FAILED")
    client = backend.client(server.uri)
    experiment = client.get_experiment_by_name("exp").experiment_id
    assert [r.info.run_id for r in client.search_runs([experiment])] == [run_id]
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"lr": "0"}
    assert found.data.tags["resumed.1"] == '{"lr": "1"}'
    assert [i.dataset.digest for i in found.inputs.dataset_inputs] == [DATASET.fingerprint]
    assert steps(server.uri, run_id, "loss") == steps(server.uri, run_id, "diverged") == list(range(8))
    stored = {p.name for p in (server.folder / "artifacts").rglob("*") if p.is_file()}
    assert {"recipe.yaml", "environment.json", "parameter_groups.md"} <= stored


def test_a_server_that_hangs_gets_each_value_once(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(server.uri, "exp", "hangs")
    run.log(0, {"loss": 1.0})
    assert run.flush()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # so that requests are given up and repeated meanwhile
    server.signal(signal.SIGSTOP)
    try:
        for step in range(1, 2000):
            run.log(step, {"loss": 1.0 / step, "lr": 0.1})
        assert not run.flush(timeout_s=2.5)
    finally:
        server.signal(signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    assert run.flush(timeout_s=120)
    assert run.close() == 0
    assert steps(server.uri, run.id, "loss") == list(range(2000))
    assert steps(server.uri, run.id, "lr") == list(range(1, 2000))


@pytest.mark.faults
def test_a_server_that_dies_and_comes_back_gets_everything(server: MlflowServer, caplog: pytest.LogCaptureFixture) -> None:
    run = open_run(server.uri, "exp", "dies")
    run.log(0, {"loss": 1.0})
    assert run.flush()
    group = server.group
    server.stop()
    try:
        wait_until(lambda: not processes_of(group), timeout_s=60)  # the server's workers are killed, and not awaited
        for step in range(1, 100):
            run.log(step, {"loss": 1.0})
        assert not run.flush(timeout_s=0.5)
        late = attach(run.reference)  # its server is away from its beginning to its end
        late.log(500, {"top1": 0.5})
        assert late.close(timeout_s=0.2) == 1
        with pytest.raises(TrackingError, match="connection refused"):
            open_run(server.uri, "exp", "dies", run.id)
        assert run.end("FAILED") is False
    finally:
        server.start()
    assert run.flush(timeout_s=120)
    assert run.close() == 0
    assert steps(server.uri, run.id, "loss") == list(range(100))
    ours = [m for m in caplog.messages if "the run continues" in m]
    assert 1 <= len(ours) <= 2  # one for each logger, however often it tried


@pytest.mark.faults
def test_what_a_server_that_is_away_at_a_checkpoint_has_not_got_is_sent_when_it_is_back(
    server: MlflowServer, tmp_path: Path
) -> None:
    """By the same process, and by one that goes on after it died."""
    opened = open_run(server.uri, "exp", "kept")
    run = attach(replace(opened.reference, spool=str(tmp_path / "spool")))
    run.log(1, {"loss": 1.0})
    assert run.keep(timeout_s=60) and not list(tmp_path.iterdir())
    server.stop()
    try:
        for step in range(2, 11):
            run.log(step, {"loss": 1.0})
        assert not run.keep(timeout_s=60)
        assert len(list((tmp_path / "spool").iterdir())) == 1
        run.log(11, {"loss": 1.0})
    finally:
        server.start()
    run.log(12, {"loss": 1.0})
    assert run.flush(timeout_s=120) and not list((tmp_path / "spool").iterdir())
    assert steps(server.uri, run.id, "loss") == list(range(1, 13))
    assert run.close() == 0

    server.stop()
    try:
        dies = attach(run.reference)
        for step in range(13, 21):
            dies.log(step, {"loss": 1.0})
        assert not dies.keep(timeout_s=60)
    finally:
        server.start()
    dies.close(timeout_s=0.0)  # its thread must not send what this test leaves to the next one
    goes_on = attach(run.reference)
    for step in range(18, 24):  # some of them again
        goes_on.log(step, {"loss": 1.0})
    assert goes_on.close() == 0
    assert steps(server.uri, run.id, "loss") == list(range(1, 24)) and not list((tmp_path / "spool").iterdir())


def test_a_server_whose_artifact_store_refuses_is_not_taken_for_one_that_is_away(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    artifacts, kept = server.folder / "artifacts", server.folder / "kept"
    artifacts.mkdir(exist_ok=True)
    artifacts.rename(kept)
    artifacts.write_text("no folder")
    try:
        run = open_run(server.uri, "exp", "refused")
        with pytest.raises(
            TrackingError, match=r"does not take files: its server .*\. Check that what it keeps its artifacts in"
        ):
            run.artifact("a.txt", "text")
        spooled = attach(replace(run.reference, spool=str(tmp_path / "spool")))
        spooled.artifact("a.txt", "text")
        assert spooled.spool and spooled.spool.waiting() == "files"
    finally:
        artifacts.unlink()
        kept.rename(artifacts)
    assert send_kept(spooled.reference, is_over=False) == ["a.txt"]
    assert any(path.name == "a.txt" for path in artifacts.rglob("*"))
