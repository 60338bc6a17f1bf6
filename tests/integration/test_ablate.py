"""jobs/ablate.py trains the rows that are not finished, and shows all of them beside the published ones."""

from __future__ import annotations

from tests.support.line import SMALL, Line

TINY = (
    "model.name=swin_nano",
    "data.frames=16",
    "data.stride=1",
    "data.size=32",
    "data.short_side=32",
    "training.workers=1",
    "training.use_gpu=false",
    "training.cpus_per_worker=1",
    "training.precision=fp32",
    "training.global_batch=16",
    "training.max_steps=1",
)


def test_a_row_is_trained_once_and_compared(cluster_line: Line) -> None:
    rows = ["--table", "6", "--rows", "none", "spatial", "--name", "mine"]
    arguments = [*rows, *cluster_line.sets(), *SMALL, *TINY]
    first = cluster_line.run("ablate", *arguments)
    assert "2 rows to train, 2 at a time" in first and "resumed from" not in first
    assert all(f"{row} | training 'mine_table6_{row}'" in first for row in ("none", "spatial"))
    row = next(x for x in first.splitlines() if x.startswith("| mine_table6_none |"))
    assert "%" not in row and " / " in row.split("|")[2] and "| 78.1 / 93.3 |" in row
    assert sorted(cluster_line.losses("mine_table6_none")) == [1]

    again = cluster_line.run("ablate", *arguments)
    assert row in again and "rows to train" not in again, "a finished row was trained again"
    listed = cluster_line.run("ablate", "--table", "6", "--list", "--name", "mine")
    assert row.split("|")[2] in listed and "| mine_table6_3d | - | 78.8 / 93.6 | 87.9 |" in listed

    from mlflow import MlflowClient

    client = MlflowClient(cluster_line.uri)
    experiment = client.get_experiment_by_name("vswin").experiment_id
    [parent] = client.search_runs([experiment], "tags.kind = 'ablation'")
    assert parent.info.run_name == "mine_table6" and parent.info.status == "FINISHED"
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} >= {"comparison.md"}
    assert {"none/top1", "spatial/top1"} <= parent.data.metrics.keys()
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {run.info.run_name: run.data.params.get("model.shift") for run in children} == {
        "mine_table6_none": "none",
        "mine_table6_spatial": "spatial",
    }
