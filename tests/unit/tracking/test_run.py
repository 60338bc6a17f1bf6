from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vswin_dist.errors import CheckpointError, ConfigError, PreflightError
from vswin_dist.tracking import backend, run

TRAIN = run.DatasetRecord("k400", "0123456789abcdef0123456789abcdef", "s3://K:S@bucket/k400?sig=1", "training",
                          {"kept": 12})
VAL = run.DatasetRecord("k400-val", "f" * 32, "/data/val", "validation")


def start(store: str, run_id: str, settings: dict[str, Any], **more: Any) -> int:
    return run.log_start(store, run_id, settings=settings, recipe="optim.lr: 1\napi_key: hush\n", source="abc",
                         world_size=4, datasets=[TRAIN, VAL], files={"parameter_groups.md": "| group |\n"}, **more)


def test_tracking_uri_is_the_setting_then_the_environment_then_sqlite_in_the_data_root(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1")
    monkeypatch.chdir(tmp_path)
    assert run.tracking_uri("http://setting:1") == "http://setting:1"
    assert run.tracking_uri(None) == "http://env:1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert run.tracking_uri(None) == f"sqlite:///{tmp_path}/home/mlflow/mlflow.db"
    assert run.tracking_uri("sqlite:///mine.db?x=1") == f"sqlite:///{tmp_path}/mine.db?x=1"


def test_files_of_a_store_without_a_server_never_go_to_the_current_folder(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSWIN_HOME", str(tmp_path))
    assert backend.artifact_folder("sqlite:////data/mine.db?x=1") == Path("/data/artifacts")
    assert backend.artifact_folder("postgresql+psycopg2://u:p@host/mlflow") == tmp_path / "mlflow" / "artifacts"
    assert backend.artifact_folder("https://mlflow.example.com") is None


def test_a_run_is_opened_ended_and_opened_again(store: str) -> None:
    run_id = run.open_run(store, "exp", "first")
    client = backend.client(store)
    assert client.get_run(run_id).info.status == "RUNNING"
    assert client.get_run(run_id).info.run_name == "first"
    assert run.end_run(store, run_id, "FAILED")
    assert client.get_run(run_id).info.status == "FAILED"
    assert run.open_run(store, "exp", "first", run_id) == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    experiment = client.get_experiment_by_name("exp").experiment_id
    assert len([r for r in client.search_runs([experiment]) if r.info.run_name == "first"]) == 1


def test_a_run_that_is_absent_or_deleted_is_refused_with_a_remedy(store: str) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)0000 of this training is not in sqlite.*run\.fresh=true"):
        run.open_run(store, "exp", "x", "0" * 32)
    run_id = run.open_run(store, "exp", "x")
    backend.client(store).delete_run(run_id)
    with pytest.raises(CheckpointError, match=f"mlflow runs restore --run-id {run_id}"):
        run.open_run(store, "exp", "x", run_id)


def test_experiments_that_cannot_be_used_are_refused(store: str) -> None:
    with pytest.raises(ConfigError, match="choose another name"):
        run.open_run(store, "Default", "x")
    backend.client(store).delete_experiment(backend.experiment_id(store, "gone"))
    with pytest.raises(ConfigError, match="'gone' was deleted"):
        run.open_run(store, "gone", "x")


def test_log_start_writes_settings_lineage_and_files_without_secrets(
        store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-environment")
    run_id = run.open_run(store, "exp", "start")
    data = {"train": "s3://K:S@bucket/k400?sig=1", "long": "x" * 9000}
    settings = {"optim": {"lr": 0.1}, "data": data, "token": "hush"}
    assert start(store, run_id, settings, tags={"init": "https://u:hush@h/x"}) == 0
    found = backend.client(store).get_run(run_id)
    assert found.data.params["optim.lr"] == "0.1"
    assert found.data.params["data.train"] == "s3://bucket/k400"
    assert found.data.params["token"] == "***"
    assert len(found.data.params["data.long"]) <= run.MAX_PARAM and "(9000 chars)" in found.data.params["data.long"]
    tags = found.data.tags
    assert (tags["source_commit"], tags["world_size"], tags["init"]) == ("abc", "4", "https://h/x")
    assert (tags["dataset.training"], tags["dataset.validation"]) == (TRAIN.fingerprint, VAL.fingerprint)
    inputs = {i.tags[0].value: i.dataset for i in found.inputs.dataset_inputs}
    assert inputs["training"].digest == TRAIN.fingerprint and inputs["validation"].name == "k400-val"
    assert json.loads(inputs["training"].source) == {"uri": "s3://bucket/k400"}
    folder = Path(found.info.artifact_uri)
    assert folder.is_relative_to(backend.artifact_folder(store))
    names = {p.name for p in folder.iterdir()}
    assert names == {"recipe.yaml", "environment.json", "parameter_groups.md"}
    assert "torch" in json.loads((folder / "environment.json").read_text())["packages"]
    everything = str(found.to_dictionary()) + "".join(p.read_text() for p in folder.iterdir())
    assert "hush" not in everything and "K:S" not in everything
    assert not list(tmp_path.iterdir())  # nothing in the current folder


def test_log_start_of_a_resumed_run_adds_and_never_changes(store: str) -> None:
    run_id = run.open_run(store, "exp", "resumed")
    start(store, run_id, {"a": 1, "b": 2})
    assert start(store, run_id, {"a": 1, "b": 3, "c": 4}) == 1
    assert start(store, run_id, {"a": 1, "b": 2, "c": 4}) == 2
    found = backend.client(store).get_run(run_id).data
    assert found.params == {"a": "1", "b": "2", "c": "4"}
    assert json.loads(found.tags["resumed.1"]) == {"b": "3"}
    assert "resumed.2" not in found.tags
    assert found.tags[run.STARTS_TAG] == "3"
    assert {f.path for f in backend.client(store).list_artifacts(run_id)} >= {"recipe.yaml", "resumed_1", "resumed_2"}


def test_more_settings_than_one_request_takes(store: str) -> None:
    run_id = run.open_run(store, "exp", "many")
    start(store, run_id, {f"p{i}": i for i in range(250)})
    assert len(backend.client(store).get_run(run_id).data.params) == 250


def test_a_store_that_is_away_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(PreflightError, match=re.escape("http://127.0.0.1:9: connection refused")) as caught:
        run.open_run("http://me:pw@127.0.0.1:9", "exp", "x")
    assert "pw" not in str(caught.value)
    with pytest.raises(PreflightError, match="database"):
        run.open_run(f"sqlite:///{tmp_path}", "exp", "x")  # a folder
    assert run.end_run("http://127.0.0.1:9", "0" * 32, "FINISHED") is False
