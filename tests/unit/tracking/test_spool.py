"""What a store does not take is kept, and sent once, whoever sends it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from vswin_dist import lease, model_card, storage
from vswin_dist.errors import FencedOut, TrackingError
from vswin_dist.lease import Fence
from vswin_dist.tracking import DatasetRecord, Registry, Run, RunReference, attach, backend, metrics, mlflow_run, run, spool
from vswin_dist.tracking.sync import find_spools, send_kept, sync

PYFUNC = Path(__file__).parents[2] / "support" / "no_model.py"
AWAY = "http://me:hush@127.0.0.1:9"  # nothing listens there
TRAIN = DatasetRecord("k400", "f" * 32, "s3://K:hush@bucket/k400?sig=1", "training", {"kept": 3})
Opened = tuple[RunReference, RunReference]  # of one run: as its store is there, and as it is away


@pytest.fixture
def away(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Opened]:
    """A run of the store, and the same one by a URI where nothing answers, with a spool and under a lease."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(metrics, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(metrics, "LONGEST_WAIT_S", 0.1)

    def make() -> Opened:
        folder = tmp_path / "runs" / "mine"
        number, claim = lease._claim(str(folder / "lease"), "the run", "wait", take_over=True)
        lease._mine.discard(claim.id)
        fence = Fence(str(folder / "lease"), number, claim.id)
        opened = run.open_run(store, "exp", "mine").reference
        there = replace(opened, spool=str(folder / "0001" / "spool"), fence=fence)
        (folder / "run.json").touch()
        return there, replace(there, uri=AWAY)

    return make


def history(reference: RunReference, name: str) -> list[tuple[int, float]]:
    client = backend.client(reference.uri)
    return sorted((m.step, m.value) for m in client.get_metric_history(reference.run_id, name))


def waiting(reference: RunReference) -> str:
    kept = attach(reference).spool
    return kept.waiting() if kept else ""


def test_metrics_are_kept_before_a_checkpoint_and_at_the_end_and_stand_once(
    away: Callable[[], Opened], store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, gone = away()
    logger = attach(gone)
    for step in range(1, 21):
        logger.log(step, {"loss": 1 / step, "lr": 0.1})
    assert not logger.keep(timeout_s=60) and waiting(gone) == "metrics"
    for step in range(21, 26):
        logger.log(step, {"loss": 1 / step})
    assert logger.close() == 0
    backend.client(store).log_batch(  # what the store has taken without an answer, and with a hole
        there.run_id, metrics=[backend.metric("loss", 1 / s, 7, s) for s in (*range(1, 13), 20)]
    )
    assert sync(str(tmp_path), uri=store)
    assert capsys.readouterr().out == f"{tmp_path}/runs/mine/0001: sent 32 metric values\n"
    assert history(there, "loss") == [(s, 1 / s) for s in range(1, 26)]
    assert history(there, "lr") == [(s, 0.1) for s in range(1, 21)]
    assert sync(str(tmp_path), uri=store) and "nothing waits" in capsys.readouterr().out


def test_a_process_that_comes_after_sends_what_one_that_died_has_kept(away: Callable[[], Opened]) -> None:
    """The steps after the last checkpoint are logged anew by the one that goes on from there."""
    there, gone = away()
    dead = attach(gone)
    for step in range(1, 11):
        dead.log(step, {"loss": 1 / step})
    assert not dead.keep()
    dead.log(11, {"loss": 1 / 11})  # dies with it
    alive = attach(there)
    for step in range(11, 14):
        alive.log(step, {"loss": 1 / step})
    assert alive.keep(timeout_s=60) and not waiting(there)
    assert alive.close() == 0
    assert history(there, "loss") == [(s, 1 / s) for s in range(1, 14)]
    dead.close()


@pytest.mark.slow
def test_many_values_go_into_the_spool_instead_of_being_lost(away: Callable[[], Opened]) -> None:
    there, gone = away()
    logger = metrics.MetricLogger(gone.uri, gone.run_id, capacity=4000, spool=attach(gone).spool)
    for first in range(0, 9000, 1500):
        for step in range(first, first + 1500):
            logger.log(step, {"loss": 1.0})
        wait_until(lambda: len(logger._waiting) <= 2000, timeout_s=60)
    assert logger.close() == 0
    assert send_kept(there, is_over=False)
    assert [s for s, _ in history(there, "loss")] == list(range(9000))


def start(opened: Run, settings: object) -> int:
    return opened.start(
        settings=settings, recipe="a: 1\n", source="abc", world_size=4, datasets=[TRAIN], files={"g.md": "x"}
    )


@pytest.mark.slow
def test_all_that_a_training_tells_is_kept_and_sent(away: Callable[[], Opened], store: str, tmp_path: Path) -> None:
    there, gone = away()
    model = f"memory://models/{tmp_path.name}"
    storage.put_bytes(f"{model}/{model_card.WEIGHTS}", b"weights")
    storage.put_bytes(f"{model}/{model_card.CARD}", json.dumps({"settings": {}}).encode())
    driver = attach(gone)
    assert start(driver, {"lr": 0.5, "token": "hush"}) == 0
    driver.artifact("stacks.txt", "password: hush")
    driver.log(1, {"loss": 1.0})
    assert driver.close() == 0
    assert driver.spool
    body = {"name": tmp_path.name, "folder_or_url": model, "tags": {"checkpoint": model, "step": 1}}
    how = {"alias": "candidate", "pyfunc": "serving/pyfunc_model.py", "since_ms": 1, "description": "What it is."}
    driver.spool.put("register", {**body, **how})
    assert not driver.end("FINISHED")
    assert waiting(gone) == "settings and lineage, metrics, files, the registration of the model, the end state"
    kept = "".join(p.read_text() for p in (tmp_path / "runs").rglob("*.json"))
    assert "hush" not in kept and "me:" not in kept

    with pytest.raises(TrackingError, match="connection refused"):
        send_kept(gone, is_over=True)
    assert waiting(gone) == waiting(there) != ""
    assert sync(str(tmp_path), uri=store) and not waiting(gone)
    found = backend.client(store).get_run(there.run_id)
    assert found.info.status == "FINISHED" and found.data.params == {"lr": "0.5", "token": "***"}
    assert found.data.tags["dataset.training"] == TRAIN.fingerprint and found.data.tags[mlflow_run.STARTS_TAG] == "1"
    assert [i.dataset.digest for i in found.inputs.dataset_inputs] == [TRAIN.fingerprint]
    names = {f.path for f in backend.client(store).list_artifacts(there.run_id)}
    assert names == {"recipe.yaml", "environment.json", "g.md", "stacks.txt"}
    champion = Registry(store).find(f"models:/{tmp_path.name}@champion")
    assert champion.version == 1 and champion.run_id == there.run_id
    assert champion.aliases == ("candidate", "champion") and champion.description == "What it is."

    how = {"tags": body["tags"], "run_id": there.run_id, "pyfunc": PYFUNC, "alias": "champion"}
    again = Registry(store).register_once(tmp_path.name, model, since_ms=1, **how)  # its answer had been lost
    assert again == f"models:/{tmp_path.name}/1"
    Registry(store).register(tmp_path.name, model, tags={}, pyfunc=PYFUNC, alias="champion")
    Registry(store).register_once(tmp_path.name, model, since_ms=1, **how)
    assert Registry(store).find(f"models:/{tmp_path.name}@champion").version == 2, "a later model lost its alias"


def test_a_start_of_which_half_was_taken_is_one_start(away: Callable[[], Opened], store: str) -> None:
    there, gone = away()
    start(attach(gone), {"lr": 0.5})
    kept = attach(there).spool
    assert kept
    [(_, body)] = kept.entries("start")
    assert mlflow_run.MlflowRun(there).send_start(body) == mlflow_run.MlflowRun(there).send_start(body) == 0
    assert send_kept(there, is_over=False) == ["settings and lineage"]
    assert backend.client(store).get_run(there.run_id).data.tags[mlflow_run.STARTS_TAG] == "1"
    assert "resumed_1" not in {f.path for f in backend.client(store).list_artifacts(there.run_id)}
    assert start(attach(there), {"lr": 0.5}) == 1


def test_the_end_of_an_earlier_submission_is_dropped_by_the_next(away: Callable[[], Opened], store: str) -> None:
    there, gone = away()
    assert not attach(gone).end("FAILED") and waiting(there) == "the end state"
    assert send_kept(there, is_over=False) == [] and not waiting(there)
    assert backend.client(store).get_run(there.run_id).info.status == "RUNNING"


def test_who_is_fenced_out_tells_the_store_nothing_and_keeps_nothing(away: Callable[[], Opened], store: str) -> None:
    there, gone = away()
    late, late_and_away = attach(there), attach(gone)
    late.log(1, {"loss": 1.0})
    assert late.keep(timeout_s=60)
    away()  # another submission
    for one in (late, late_and_away):
        one.log(2, {"loss": 2.0})
        one.keep(timeout_s=1)
        assert one.close(timeout_s=60) == 0 and not one.end("FAILED")
    assert history(there, "loss") == [(1, 1.0)] and not waiting(gone)
    assert backend.client(store).get_run(there.run_id).info.status == "RUNNING"
    with pytest.raises(FencedOut):
        start(late_and_away, {})


def test_a_store_with_a_password_is_found_in_the_environment(
    away: Callable[[], Opened], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, gone = away()
    attach(gone).end("FINISHED")
    [url] = find_spools(str(tmp_path))
    entry = spool.read_entry(storage.join(url, storage.list_names(url)[0]))
    assert entry.uri == "http://127.0.0.1:9"
    from vswin_dist.tracking.sync import store

    assert store(entry.uri, None) == entry.uri and store(entry.uri, "sqlite:///x") == "sqlite:///x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    assert store(entry.uri, None) == AWAY
    assert not sync(str(tmp_path))
    assert "runs/mine/0001: cannot use MLflow at http://127.0.0.1:9: connection refused" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "runs", "runs/mine", "runs/mine/0001"])
def test_spools_are_found_from_any_folder_above(away: Callable[[], Opened], tmp_path: Path, below: str) -> None:
    _, gone = away()
    attach(gone).end("FINISHED")
    for other in ("runs/mine/0002/step-00000001/spool", "runs/mine/ray/spool", "models/runs/x/spool"):
        (tmp_path / other).mkdir(parents=True)
    assert list(find_spools(str(tmp_path / below))) == [gone.spool]


@pytest.mark.slow
def test_the_command_says_what_it_did_and_a_run_in_training_is_left_to_its_driver(
    away: Callable[[], Opened], store: str, tmp_path: Path
) -> None:
    there, gone = away()
    attach(gone).log(1, {"loss": 1.0})
    logger = attach(gone)
    logger.log(1, {"loss": 1.0})
    logger.close()
    command = [sys.executable, "-m", "vswin_dist.tracking", "sync", str(tmp_path / "runs"), "--tracking-uri", store]
    with lease.held(str(tmp_path / "runs" / "mine" / "lease"), "the training run 'mine'", "wait"):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "is held by pid" in done.stdout and "it sends this itself" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/runs/mine/0001: sent 1 metric values\n"), done.stderr
    assert history(there, "loss") == [(1, 1.0)]


def test_a_damaged_record_is_named_and_the_other_runs_are_sent(
    away: Callable[[], Opened], store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, gone = away()
    attach(gone).end("FINISHED")
    other = tmp_path / "runs" / "another" / "0001" / "spool"
    other.mkdir(parents=True)
    (other / "0001-1-end-x.json").write_text("{")
    assert not sync(str(tmp_path), uri=store)
    assert "0001-1-end-x.json is not a valid record of what MLflow has not got" in capsys.readouterr().out
    assert backend.client(store).get_run(there.run_id).info.status == "FINISHED"
