from __future__ import annotations

import http.server
import json
import pickle
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.mlflow_store import new_store
from vswin_dist.errors import CheckpointError, ConfigError, StorageError, TrackingError
from vswin_dist.tracking import NONE, NullRun, Registry, Run, RunReference, attach, backend, mlflow_run, run

TRAIN = run.DatasetRecord("k400", "0123456789abcdef0123456789abcdef", "s3://K:S@bucket/k400?sig=1", "training", {"kept": 12})
VAL = run.DatasetRecord("k400-val", "f" * 32, "/data/val", "validation")


def start(opened: Run, settings: dict[str, Any], **more: Any) -> int:
    return opened.start(
        settings=settings,
        recipe="optim.lr: 1\napi_key: hush\n",
        source="abc",
        world_size=4,
        datasets=[TRAIN, VAL],
        files={"parameter_groups.md": "| group |\n"},
        **more,
    )


def test_tracking_uri_is_the_setting_then_the_environment_then_sqlite_in_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSWIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1")
    monkeypatch.chdir(tmp_path)
    assert run.tracking_uri("http://setting:1") == "http://setting:1"
    assert run.tracking_uri(None) == "http://env:1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert run.tracking_uri(None) == f"sqlite:///{tmp_path}/home/mlflow/mlflow.db"
    assert run.tracking_uri("sqlite:///mine.db?x=1") == f"sqlite:///{tmp_path}/mine.db?x=1"


def test_files_of_a_store_without_a_server_never_go_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSWIN_HOME", str(tmp_path))
    assert backend.artifact_folder("sqlite:////data/mine.db?x=1") == Path("/data/artifacts")
    assert backend.artifact_folder("postgresql+psycopg2://u:p@host/mlflow") == tmp_path / "mlflow" / "artifacts"
    assert backend.artifact_folder("https://mlflow.example.com") is None


def test_a_run_is_opened_ended_and_opened_again(store: str) -> None:
    first = run.open_run(store, "exp", "first")
    client = backend.client(store)
    assert client.get_run(first.id).info.status == "RUNNING"
    assert client.get_run(first.id).info.run_name == "first"
    assert first.end("FAILED")
    assert client.get_run(first.id).info.status == "FAILED"
    assert run.open_run(store, "exp", "first", first.id).id == first.id
    assert client.get_run(first.id).info.status == "RUNNING"
    experiment = client.get_experiment_by_name("exp").experiment_id
    assert len([r for r in client.search_runs([experiment]) if r.info.run_name == "first"]) == 1


def test_another_process_attaches_by_plain_values(store: str) -> None:
    opened = run.open_run(store, "exp", "attached")
    reference = pickle.loads(pickle.dumps(opened.reference))
    assert reference == RunReference(store, opened.id)
    rank = attach(reference)
    rank.log(3, {"loss": 0.5})
    assert rank.flush() and rank.close() == 0
    rank.artifact("note.txt", "api_key: hush")
    assert [(m.step, m.value) for m in backend.client(store).get_metric_history(opened.id, "loss")] == [(3, 0.5)]
    [note] = Path(backend.client(store).get_run(opened.id).info.artifact_uri).glob("note.txt")
    assert "hush" not in note.read_text()


def test_nothing_is_tracked_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "client", lambda uri: pytest.fail("a store was asked"))
    run.check_store(NONE)
    run.check_store(NONE, run.Names(experiment="", run_id="x", model="a/b", alias="v1"), make=True)
    opened = run.open_run(run.tracking_uri("none"), "exp", "x")
    assert start(opened, {"a": 1}) == 0
    for one in (opened, attach(opened.reference), NullRun()):
        one.log(1, {"loss": 1.0})
        one.artifact("a", "b")
        assert isinstance(one, NullRun) and one.flush() and one.end("FINISHED") and one.close() == 0
    assert attach(opened.reference).id == opened.id == run.open_run(NONE, "exp", "x", opened.id).id
    assert run.open_run(NONE, "exp", "x").id != opened.id
    with pytest.raises(CheckpointError, match=r"was begun with tracking\.uri=none.*resume with tracking\.uri=none"):
        run.open_run("sqlite:////x.db", "exp", "x", opened.id)


def test_a_run_that_is_absent_or_deleted_is_refused_with_a_remedy(store: str) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)0000 is not in sqlite.*run\.fresh=true"):
        run.open_run(store, "exp", "x", "0" * 32)
    gone = run.open_run(store, "exp", "x")
    backend.client(store).delete_run(gone.id)
    with pytest.raises(CheckpointError, match=f"mlflow runs restore --run-id {gone.id}"):
        run.open_run(store, "exp", "x", gone.id)


def test_experiments_that_cannot_be_used_are_refused(store: str) -> None:
    with pytest.raises(ConfigError, match="choose another name"):
        run.open_run(store, "Default", "x")
    backend.client(store).delete_experiment(backend.experiment_id(store, "gone"))
    with pytest.raises(ConfigError, match="'gone' was deleted"):
        run.open_run(store, "gone", "x")


def test_names_are_checked_before_there_is_a_store_and_none_is_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    run.check_store(uri, run.Names(experiment="exp", model="1.10"))
    for names, message in {
        run.Names(experiment="Default"): "keeps its files in the current folder",
        run.Names(experiment="e" * 501): "501 characters: name one of 1 to 500",
        run.Names(model="a/b"): "refuses the model name 'a/b'",
        run.Names(alias="v1"): "refuses the alias 'v1'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run.check_store(uri, names)
    with pytest.raises(CheckpointError, match=r"the MLflow run 0000 is not in sqlite.*run\.fresh=true"):
        run.check_store(uri, run.Names(run_id="0000"))
    with pytest.raises(CheckpointError, match=r"was begun with tracking\.uri=none"):
        run.check_store(uri, run.Names(run_id=NullRun().id))
    assert not list((tmp_path / "mlflow").iterdir())


def test_log_start_writes_settings_lineage_and_files_without_secrets(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-environment")
    opened = run.open_run(store, "exp", "start")
    data = {"train": "s3://K:S@bucket/k400?sig=1", "long": "x" * 9000}
    settings = {"optim": {"lr": 0.1}, "data": data, "token": "hush"}
    assert start(opened, settings, tags={"init": "https://u:hush@h/x"}) == 0
    found = backend.client(store).get_run(opened.id)
    assert found.data.params["optim.lr"] == "0.1"
    assert found.data.params["data.train"] == "s3://bucket/k400"
    assert found.data.params["token"] == "***"
    assert len(found.data.params["data.long"]) <= mlflow_run.MAX_PARAM and "(9000 chars)" in found.data.params["data.long"]
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
    opened = run.open_run(store, "exp", "resumed")
    start(opened, {"a": 1, "b": 2})
    assert start(opened, {"a": 1, "b": 3, "c": 4}) == 1
    assert start(opened, {"a": 1, "b": 2, "c": 4}) == 2
    found = backend.client(store).get_run(opened.id).data
    assert found.params == {"a": "1", "b": "2", "c": "4"}
    assert json.loads(found.tags["resumed.1"]) == {"b": "3"}
    assert "resumed.2" not in found.tags
    assert found.tags[mlflow_run.STARTS_TAG] == "3"
    assert {f.path for f in backend.client(store).list_artifacts(opened.id)} >= {"recipe.yaml", "resumed_1", "resumed_2"}


def test_what_has_its_default_is_no_param_and_what_is_changed_later_is_told(store: str) -> None:
    opened, defaults = run.open_run(store, "exp", "defaults"), {"a": 1, "b": 5, "c": (1,)}
    assert start(opened, {"a": 1, "b": 2, "c": (1,), "name": "x"}, defaults=defaults) == 0
    # From its default to another value, back to it, and a setting that is newer than the run.
    assert start(opened, {"a": 3, "b": 5, "c": (1,), "name": "x", "d": 1}, defaults=defaults | {"d": 0}) == 1
    assert start(opened, {"a": 1, "b": 2, "c": (1,), "name": "x", "d": 0}, defaults=defaults | {"d": 0}) == 2
    found = backend.client(store).get_run(opened.id).data
    assert found.params == {"b": "2", "name": "x"}
    assert json.loads(found.tags["resumed.1"]) == {"a": "3", "b": "5", "d": "1"} and "resumed.2" not in found.tags


def test_more_settings_than_one_request_takes(store: str) -> None:
    opened = run.open_run(store, "exp", "many")
    start(opened, {f"p{i}": i for i in range(250)})
    assert len(backend.client(store).get_run(opened.id).data.params) == 250


def test_a_store_that_is_away_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=re.escape("http://127.0.0.1:9: connection refused")) as caught:
        run.open_run("http://me:pw@127.0.0.1:9", "exp", "x")
    assert "pw" not in str(caught.value)
    with pytest.raises(TrackingError, match="database"):
        run.open_run(f"sqlite:///{tmp_path}", "exp", "x")  # a folder
    away = attach(RunReference("http://127.0.0.1:9", "0" * 32))
    assert away.end("FINISHED") is False and away.close() == 0
    with pytest.raises(TrackingError, match="connection refused"):
        start(away, {})
    with pytest.raises(TrackingError, match="connection refused"):
        away.artifact("a", "b")
    with pytest.raises(TrackingError, match="connection refused"):
        run.check_store("http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot write to /proc/no"):
        run.check_store("sqlite:////proc/no/mlflow.db")


def test_a_store_that_takes_no_files_is_told_from_one_that_is_away(tmp_path: Path) -> None:
    """Without a server the disk itself refuses; what a server answers: tests/integration/test_tracking_server.py."""
    uri = new_store(tmp_path / "mlflow.db")
    (tmp_path / "artifacts").write_text("a file where the folder should be")
    opened = run.open_run(uri, "exp", "x")
    for log in (lambda: opened.artifact("a.txt", "text"), lambda: opened.artifact_file("b", Path(__file__))):
        with pytest.raises(TrackingError, match=r"does not take files: .*Not a directory.* has room and may be written"):
            log()
    with pytest.raises(TrackingError, match="does not take files"):
        start(opened, {"a": 1})
    kept = attach(replace(opened.reference, spool=str(tmp_path / "spool")))
    start(kept, {"a": 2})
    assert kept.spool and kept.spool.waiting() == "settings and lineage"


def test_a_store_that_stays_away_is_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that comes back: tests/faults/test_stores_away.py."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(run, "PATIENCE_S", 0.5)
    monkeypatch.setattr(run, "ASKED_AGAIN_S", 0.2)
    with pytest.raises(TrackingError, match="connection refused"):
        run.wait_for_store("http://127.0.0.1:9")
    said = capsys.readouterr().err
    assert said.count("warning: cannot use MLflow") == 1 and "It is asked again for 0.5 s." in said
    run.wait_for_store(NONE)


class Denied(http.server.BaseHTTPRequestHandler):
    """Answers as MLflow's server does where an account has no right; real accounts are in `make tracking-demo`."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"Permission denied")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_an_account_without_the_right_is_told_so() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Denied) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        refusals: list[Callable[[], object]] = [
            lambda: run.check_store(uri),
            lambda: run.wait_for_store(uri),
            lambda: Registry(uri).find("models:/m@champion"),
            lambda: Registry(uri).set_alias("m", "champion", 1),
        ]
        for refused in refusals:
            with pytest.raises(TrackingError, match="refuses this to the account of MLFLOW_TRACKING_USERNAME: ") as error:
                refused()
            assert not error.value.retriable
        server.shutdown()


def test_experiments_open_in_the_view_of_trainings(store: str) -> None:
    """The value is that of MLflow's own pages; a mark of the user's stays, one that MLflow has guessed does not."""
    client, key = backend.client(store), "mlflow.experimentKind"
    run.open_run(store, "kind-new", "x")
    for name, known in {
        "kind-old": None,
        "kind-guessed": "genai_development_inferred",
        "kind-own": "genai_development",
    }.items():
        client.create_experiment(name, tags={key: known} if known else None)
        run.open_run(store, name, "x")
    marks = [client.get_experiment_by_name(f"kind-{n}").tags[key] for n in ("new", "old", "guessed", "own")]
    assert marks == [*["custom_model_development"] * 3, "genai_development"]
    pages = Path(backend.mlflow().__file__).parent / "server/js/build/static/js"
    assert any('"custom_model_development"' in page.read_text() for page in pages.glob("*.js"))
