"""The page of a training: of real checkpoints, by the process that draws it, into a real store, without training."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import ALONE, flip_a_bit, state_of
from vswin_dist.config import load_settings
from vswin_dist.data.plan import make_plan
from vswin_dist.evaluation.evaluate import Views
from vswin_dist.evaluation.predictions import Found, read
from vswin_dist.manifest import Manifest, read_manifest
from vswin_dist.model_card import ModelCard
from vswin_dist.tracking import attach, backend, open_run
from vswin_dist.training import pictures, validated
from vswin_dist.training.checkpoint import CheckpointWriter, Position
from vswin_dist.training.pictures import pictured
from vswin_dist.training.spec import TrainingSpec
from vswin_dist.training.trainer import WorkerConfig


class Training:
    """A training whose ranks have ended, or whose driver is at work, with a store that may not be there."""

    def __init__(self, shards: Path, home: Path, uri: str) -> None:
        self.settings = load_settings("demo", ["run.name=r", f"data.train={shards}/train", f"data.val={shards}/val"])
        train, self.val = (read_manifest(f"{shards}/{part}") for part in ("train", "val"))
        self.url = str(home / "0001")
        reference = open_run(uri if uri.startswith("sqlite") else "none", "exp", "r").reference
        reference = replace(reference, uri=uri, spool=str(home / "0001" / "spool"))
        self.run, self.config = attach(reference), WorkerConfig(self.settings, self.url, reference)
        self.spec = TrainingSpec(
            *(self.settings, uri, str(home), None, 1, train, self.val),
            *(make_plan(train, self.settings.data, 0, 16), {2: 1}, 12345, [], ""),
        )

    def save(self, step: int, right: int) -> None:
        """Save a checkpoint whose validation had the first `right` videos right."""
        found = found_of(self.val, right)
        writer = CheckpointWriter(self.url, ALONE, keep=9)
        writer.claim()
        metrics = found.scores(self.val).metrics()
        position = Position(step, 1, 16, "run", self.spec.train.fingerprint, {}, [], {}, metrics)
        beside = {validated.FILE: lambda: validated.to_parquet(found, self.val, Views(1, 1, 8), step)}
        writer.save(position, state_of({"w": torch.ones(2)}, {}), ModelCard({}, self.val.classes, {}, {}), beside)
        writer.finish()


def found_of(manifest: Manifest, right: int) -> Found:
    labels = manifest.samples.numbers("class_id").astype(np.int64)
    given = np.where(np.arange(len(labels)) < right, labels, (labels + 1) % len(manifest.classes))
    return Found(np.arange(len(labels)), labels, 0.02 + 0.88 * np.eye(len(manifest.classes))[given], [])


def until(condition: object, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_each_new_best_and_the_end_are_drawn_and_logged(
    motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(pictures, "IN_THE_COURSE", ("--at-once",))  # tests beside this one would go first for minutes
    uri = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    t = Training(motion_shards, tmp_path, uri)
    t.run.log(1, {"train/loss": 1.5})
    t.run.log(2, {"train/loss": 0.5})
    assert t.run.flush()
    report = Path(t.url) / "report" / "report.html"
    with pictured(t.spec, t.config, t.run):
        t.save(2, right=3)
        until(report.exists)
        so_far = report.read_text()
        t.save(4, right=9)
        t.save(6, right=6)
    assert "r: step 2, the best so far" in so_far and "<b>25.00%</b>top-1" in so_far
    html = report.read_text()
    assert "r: step 4, the best<" in html and "<b>75.00%</b>top-1" in html and 'chart">' in html
    assert read(f"{t.url}/step-00000004/{validated.FILE}").keys == t.val.samples.column("key").tolist()
    client = backend.client(uri)
    logged = {f.path for f in client.list_artifacts(t.run.id)} | {
        f.path for f in client.list_artifacts(t.run.id, "pictures")
    }
    assert {"report.html", "pictures/loss.svg", "pictures/confusion.svg", "pictures/balance.svg"} <= logged
    assert Path(client.download_artifacts(t.run.id, "report.html")).read_text() == html
    assert capsys.readouterr().out.splitlines()[-1] == f"report                   {report}"


@pytest.mark.slow
def test_what_a_store_that_is_away_does_not_take_is_beside_the_checkpoints_and_kept_for_it(
    motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    t = Training(motion_shards, tmp_path, "http://127.0.0.1:9")
    t.save(2, right=3)
    with pictured(t.spec, t.config, t.run):
        pass
    assert t.run.spool and t.run.spool.waiting() == "files"
    assert "report.html" in [body["path"] for _, body in t.run.spool.entries("artifact")]
    assert (Path(t.url) / "report" / "report.html").exists()


@pytest.mark.slow
def test_what_cannot_be_drawn_is_a_warning_and_a_failed_training_draws_no_more(
    motion_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t = Training(motion_shards, tmp_path, "none")
    t.save(2, right=3)
    flip_a_bit(Path(t.url, "step-00000002", validated.FILE))
    with pictured(t.spec, t.config, t.run):
        pass
    told = capsys.readouterr()
    assert "warning: the report of this training is not complete: drawing failed: " in told.err and "report " not in told.out
    assert f"{validated.FILE} holds no predictions of this version, or is damaged" in told.err
    with pytest.raises(KeyboardInterrupt), pictured(t.spec, t.config, t.run):
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "")


def test_it_can_be_left_out(motion_shards: Path, tmp_path: Path) -> None:
    t = Training(motion_shards, tmp_path, "none")
    t.save(2, right=3)
    off = replace(t.settings, evaluation=replace(t.settings.evaluation, report=False))
    with pictured(replace(t.spec, settings=off), t.config, t.run):
        pass
    assert not (Path(t.url) / "report").exists()
