"""A training's run on a real MLflow server that hangs, dies and comes back."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.mlflow_server import MlflowServer, mlflow_server
from vswin_dist.errors import PreflightError
from vswin_dist.tracking import DatasetRecord, MetricLogger, backend, end_run, log_start, open_run

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
    run_id = open_run(server.uri, "exp", "one")
    for start in range(2):  # submitted, ended, and submitted again
        assert open_run(server.uri, "exp", "one", run_id) == run_id
        number = log_start(server.uri, run_id, settings={"lr": start}, recipe="optim.lr: 0\n", source="abc",
                           world_size=2, datasets=[DATASET], files={"parameter_groups.md": "| group |\n"})
        assert number == start
        logger = MetricLogger(server.uri, run_id)
        for step in range(start * 3, start * 3 + 5):
            logger.log(step, {"loss": 1.0, "diverged": float("nan")})
        assert logger.close() == 0
        assert end_run(server.uri, run_id, "FINISHED" if start else "FAILED")
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
    run_id = open_run(server.uri, "exp", "hangs")
    logger = MetricLogger(server.uri, run_id)
    logger.log(0, {"loss": 1.0})
    assert logger.flush()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # so that requests are given up and repeated meanwhile
    server.signal(signal.SIGSTOP)
    try:
        for step in range(1, 2000):
            logger.log(step, {"loss": 1.0 / step, "lr": 0.1})
        assert not logger.flush(timeout_s=2.5)
    finally:
        server.signal(signal.SIGCONT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    assert logger.flush(timeout_s=120)
    assert logger.close() == 0
    assert steps(server.uri, run_id, "loss") == list(range(2000))
    assert steps(server.uri, run_id, "lr") == list(range(1, 2000))


def test_a_server_that_dies_and_comes_back_gets_everything(
        server: MlflowServer, caplog: pytest.LogCaptureFixture) -> None:
    run_id = open_run(server.uri, "exp", "dies")
    logger = MetricLogger(server.uri, run_id)
    logger.log(0, {"loss": 1.0})
    assert logger.flush()
    group = server.group
    server.stop()
    try:
        assert not processes_of(group)
        for step in range(1, 100):
            logger.log(step, {"loss": 1.0})
        assert not logger.flush(timeout_s=0.5)
        late = MetricLogger(server.uri, run_id)  # its server is away from its beginning to its end
        late.log(500, {"top1": 0.5})
        assert late.close(timeout_s=0.2) == 1
        with pytest.raises(PreflightError, match="connection refused"):
            open_run(server.uri, "exp", "dies", run_id)
        assert end_run(server.uri, run_id, "FAILED") is False
    finally:
        server.start()
    assert logger.flush(timeout_s=120)
    assert logger.close() == 0
    assert steps(server.uri, run_id, "loss") == list(range(100))
    ours = [m for m in caplog.messages if "training goes on" in m]
    assert 1 <= len(ours) <= 2  # one for each logger, however often it tried
