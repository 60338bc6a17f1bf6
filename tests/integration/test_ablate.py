"""jobs/ablate.py trains the rows that are not finished, and shows all of them beside the published ones."""

from __future__ import annotations

from tests.support.line import SMALL, Line

TINY = ("model.name=swin_nano", "data.frames=16", "data.stride=1", "data.size=32", "data.short_side=32",
        "training.workers=1", "training.use_gpu=false", "training.cpus_per_worker=1", "training.precision=fp32",
        "training.global_batch=16", "training.max_steps=1")


def test_a_row_is_trained_once_and_compared(line: Line) -> None:
    arguments = ["--table", "6", "--rows", "none", "--name", "mine", *line.sets(), *SMALL, *TINY]
    first = line.run("ablate", *arguments)
    assert "training 'mine_table6_none'" in first and "resumed from" not in first
    row = next(x for x in first.splitlines() if x.startswith("| mine_table6_none |"))
    assert "%" not in row and " / " in row.split("|")[2] and "| 78.1 / 93.3 |" in row
    assert sorted(line.losses("mine_table6_none")) == [1]

    again = line.run("ablate", *arguments)
    assert row in again and "training 'mine_table6_none'" not in again, "a finished row was trained again"
    listed = line.run("ablate", "--table", "6", "--list", "--name", "mine")
    assert row.split("|")[2] in listed and "| mine_table6_spatial | - | 78.5 / 93.5 | 87.9 |" in listed

    from mlflow import MlflowClient

    client = MlflowClient(line.uri)
    runs = client.search_runs([client.get_experiment_by_name("vswin").experiment_id], "tags.mlflow.runName = 'mine_table6'")
    assert len(runs) == 2 and {f.path for f in client.list_artifacts(runs[0].info.run_id)} >= {"comparison.md"}
