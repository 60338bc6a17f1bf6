"""A bucket or the tracking store that goes away, and a shard that is damaged: failed work or none, never bad input."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support import trainers
from tests.support.drill import Drill, record
from tests.support.line import SMALL, Line, own_lines
from tests.support.mlflow_server import mlflow_server
from tests.support.s3_server import S3Server
from tests.support.shards import with_damaged_storage
from tests.support.waiting import below, wait_until
from vswin_dist import storage
from vswin_dist.config import load_settings
from vswin_dist.manifest import read_manifest
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import write_model
from vswin_dist.tracking import Registry
from vswin_dist.training import checkpoint

RESUMES = "Once that is mended, the same command resumes from the last checkpoint."
SETTINGS = ("training.checkpoint_every=1", "training.keep_checkpoints=6", "training.epochs=40", "training.max_steps=12")


def test_a_bucket_that_goes_away_ends_with_1_and_mlflow_without_which_the_same_command_finishes(
    cluster_line: Line,
    object_store: S3Server,
    object_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """What MLflow misses (metrics of the last steps, the model, the end state) is sent later, once."""
    line, s3 = cluster_line, object_store
    place, root = s3.path(object_prefix), object_prefix
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    for file in (p for p in (line.shards / "train").iterdir() if p.is_file()):
        storage.put_file(file, f"{root}/train/{file.name}")  # what is copied below it, the server does not see for a while
    line.env |= {**s3.environment, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    line.env["AWS_MAX_ATTEMPTS"] = "1"  # of botocore, within each of ours: the driver tries for 3 s instead of 50
    drill = Drill(line, "away", line.home / "second.log")
    log = line.home / "first.log"

    def committed(step: int) -> list[Path]:
        return [p for p in below(place / "runs", checkpoint.COMMIT) if p.parent.name.startswith(f"step-{step:08d}")]

    with mlflow_server(tmp_path / "mlflow") as server:
        command = ("--recipe", "demo", "run.name=away", f"data.train={root}/train", *SMALL, *SETTINGS)
        command += (f"storage.root={root}/runs", f"storage.s3_endpoint={s3.endpoint}", f"tracking.uri={server.uri}")
        command += ("training.workers=1", "training.max_failures=0")
        try:
            with line.running("train", *command, output=log) as process:
                wait_until(lambda: committed(3), process)
                drill.happens("S3 is away for good: exit 1; back, the same command")
                s3.stop()
                assert process.wait(timeout=400) == 1, log.read_text()[-4000:]
        finally:
            s3.start()
        error = own_lines(log.read_text())[-1]
        assert error.startswith("error: ") and "s3://" in error and error.endswith(RESUMES), error

        with line.running("train", *command, output=drill.log) as process:
            wait_until(lambda: committed(6), process)
            server.stop()
            assert process.wait(timeout=400) == 0, drill.log.read_text()[-4000:]
        text = drill.log.read_text()
        assert "resumed from" in text and "step 12/12" in text
        sync = f"python -m vswin_dist.tracking sync {root}/runs/away"
        assert f"warning: cannot use MLflow at {server.uri}: connection refused." in text and sync in text, text[-3000:]
        model = next(words.split()[1] for words in text.splitlines() if words.startswith("model "))
        assert model.startswith(f"{root}/runs/away/"), "where nothing is registered yet, the checkpoint is named"

        server.start()
        assert max(line.losses("away", server.uri)) < 12, "the last steps were to be missing"
        refused = line.run("train", *command, code=2)
        assert "is finished" in refused and sync in refused
        arguments = [sys.executable, *sync.split()[1:]]
        done = subprocess.run(arguments, env=line.environment, capture_output=True, text=True)
        assert done.returncode == 0 and "registered models:/away/1, the end state FINISHED" in done.stdout, done.stderr
        champion = Registry(server.uri).find("models:/away@champion")
        assert champion.aliases == ("candidate", "champion") and "## Limits" in champion.description
        assert champion.run_id == line.run_of("away", server.uri).info.run_id
        assert line.run_of("away", server.uri).info.status == "FINISHED"
        again = subprocess.run(arguments, env=line.environment, capture_output=True, text=True)
        assert again.returncode == 0 and "nothing waits" in again.stdout

        expected = trainers.losses(trainers.train(line, "whole", *SETTINGS))
        assert line.losses("away", server.uri) == pytest.approx(expected, abs=1e-5) and len(expected) == 12
        rows = drill.rows(expected, server.uri)
    for row in [*rows, ("MLflow is away to the end: exit 0, and `sync` makes up for it", "no stop", "0", rows[0][-1])]:
        record(request, *row)


def test_scores_are_printed_and_logged_late_where_the_store_goes_away_meanwhile(line: Line, tmp_path: Path) -> None:
    """The store is asked before the scoring, is gone after it, and comes back."""
    line.env = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "PYTHONUNBUFFERED": "1"}
    manifest, log = read_manifest(f"{line.shards}/val"), line.home / "scores.log"
    data = load_settings("demo", [f"data.train={line.shards}/train", "data.sampling=dense"]).data
    network, how = build_model("swin_nano", num_classes=len(manifest.classes)), preprocessing_of(data)
    model = write_model(str(line.home / "m"), network, classes=manifest.classes, preprocessing=how, lineage={})
    with mlflow_server(tmp_path / "mlflow") as server:
        args = ("--model", model, "--data", f"{line.shards}/val", "--clips", "2", "--crops", "3", "--workers", "0")
        with line.running("evaluate", *args, "--tracking-uri", server.uri, output=log) as process:
            client = MlflowClient(server.uri)
            wait_until(lambda: "scoring 12 of 12" in log.read_text(), process)
            server.stop()
            away = f"warning: cannot use MLflow at {server.uri}: connection refused."
            wait_until(lambda: away in log.read_text(), process)
            assert "scored 12 / missing 0" in log.read_text() and "It is asked again for 120 s." in log.read_text()
            server.start()
            assert process.wait(timeout=400) == 0, log.read_text()[-4000:]
        [run] = client.search_runs([client.get_experiment_by_name("vswin-evaluations").experiment_id])
        assert run.info.status == "FINISHED" and "test/top1" in run.data.metrics
    assert log.read_text().count("cannot use MLflow") == 1


def test_a_damaged_shard_is_named_with_its_repair(line: Line, tmp_path: Path) -> None:
    manifest = with_damaged_storage(line.shards / "train", tmp_path / "train", 3)
    shard = f"{tmp_path}/train/{manifest.shards[manifest.samples[3].shard].url}"
    says = f"Error: sample {manifest.samples[3].key!r} cannot be read: {shard}: the "
    with pytest.raises(AssertionError, match=f"{re.escape(says)}.*run data-prep verify --repair {tmp_path}/train"):
        trainers.train(line, "damaged", f"data.train={tmp_path}/train")
