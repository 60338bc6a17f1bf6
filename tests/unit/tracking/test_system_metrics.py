"""Use of each node in MLflow."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from vswin_dist.device import Rank
from vswin_dist.tracking import NullRun, RunReference, attach, open_run
from vswin_dist.tracking import system_metrics as module
from vswin_dist.tracking.system_metrics import Sampler, system_metrics

ONE = Rank(0, 1, torch.device("cpu"))


@pytest.mark.slow
def test_nodes_are_told_apart_and_a_step_has_one_value(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_EVERY_S", 0.1)
    run = open_run(store, "system", "nodes")
    samplers = [Sampler(run, node, lambda: 7) for node in ("node-a", "node:b")]
    for sampler in samplers:
        sampler._thread.join(1)
        sampler.close()
        sampler._thread.join()
    assert run.flush()
    run.close()
    found = MlflowClient(store).get_run(run.id).data.metrics
    for node in ("node-a", "node_b"):
        name = f"system/{node}/system_memory_usage_percentage"
        assert 0 < found[name] <= 100
        assert [m.step for m in MlflowClient(store).get_metric_history(run.id, name)] == [7]
        assert f"system/{node}/cpu_utilization_percentage" in found


def test_a_rank_logs_its_node_and_closes_what_it_opened(store: str) -> None:
    opened = open_run(store, "system", "rank")
    main = attach(opened.reference)
    with system_metrics(main, opened.reference, ONE, lambda: 3):
        pass
    main.close()
    with system_metrics(NullRun(), opened.reference, ONE, lambda: 4):  # as where the main rank is on another node
        pass
    name = f"system/{socket.gethostname()}/system_memory_usage_percentage"
    assert [m.step for m in MlflowClient(store).get_metric_history(opened.id, name)] == [3, 4]


def test_nothing_is_sampled_where_nothing_is_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Sampler", None)
    with system_metrics(NullRun(), RunReference("none", ""), ONE, lambda: 1):
        pass


def test_a_file_becomes_an_artifact(store: str, tmp_path: Path) -> None:
    (tmp_path / "trace.gz").write_bytes(b"\x00\xff")
    run = open_run(store, "system", "file")
    run.artifact_file("profile/trace.gz", tmp_path / "trace.gz")
    artifact = MlflowClient(store).download_artifacts(run.id, "profile/trace.gz", str(tmp_path / ""))
    assert Path(artifact).read_bytes() == b"\x00\xff"
