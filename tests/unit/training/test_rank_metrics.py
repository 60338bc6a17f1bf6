"""Metrics of every rank: what is exported of what is logged, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vswin_dist import cluster
from vswin_dist.device import Rank
from vswin_dist.tracking import NullRun
from vswin_dist.training import rank_metrics
from vswin_dist.training.rank_metrics import EXPORTED

DASHBOARD = Path(__file__).parents[3] / "infra/grafana/trainings.json"
TAGS = {"run", "rank"}


def queries() -> list[str]:
    """Every query of the dashboard."""
    board = json.loads(DASHBOARD.read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return panels + [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]


def unknown(query: str) -> set[str]:
    """The metrics and labels of a query that no rank exports."""
    metrics = set(re.findall(r"\b[a-z]\w*_\w+\b(?!\s*\()", re.sub(r"\{[^}]*\}", "", query)))
    by = [name.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for name in group.split(",")]
    labels = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|!~|=)", query)) | set(by)
    return (metrics - {e.series for e in EXPORTED.values()}) | (labels - TAGS)


def test_the_dashboard_asks_for_what_ranks_export_and_for_all_of_it() -> None:
    asked = queries()
    assert len(asked) >= len(EXPORTED) and [u for q in asked for u in unknown(q)] == []
    assert [e.series for e in EXPORTED.values() if not any(e.series in q for q in asked)] == []


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ('sum by (run) (ray_vswin_clips{run=~"$run"})', {"ray_vswin_clips"}),
        ("rate(ray_vswin_read_bytes[5m])", {"ray_vswin_read_bytes"}),
        ("sum by (run, node) (ray_vswin_bad_samples)", {"node"}),
        ('ray_vswin_bad_samples{job="x"}', {"job"}),
    ],
)
def test_a_wrong_query_is_found(query: str, wrong: set[str]) -> None:
    assert unknown(query) == wrong


def test_the_panels_of_the_dashboard_stand_beside_each_other() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_what_a_rank_logs_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, dict[str, str], float]] = []

    def metric(name: str, text: str, tags: dict[str, str]) -> Callable[[float], None]:
        return lambda value: told.append((name, tags, value))

    monkeypatch.setattr(cluster, "gauge", metric)
    monkeypatch.setattr(cluster, "counter", metric)
    run = NullRun()
    rank_metrics.export(run, Rank(1, 4, torch.device("cpu")), "mine")
    run.log(1, {"train/loss": 1.0, "train/clips_per_second": 100.0})
    run.log(10, {"data/bytes_read": 500.0})
    run.log(20, {"data/bytes_read": 500.0})
    run.log(30, {"data/bytes_read": 700.0, "data/bad_videos": 2})
    tags = {"run": "mine", "rank": "1"}
    assert [t for t in told if t[0] != "vswin_bad_samples"] == [
        ("vswin_clips_per_second", tags, 25.0),
        ("vswin_read_bytes", tags, 500.0),
        ("vswin_read_bytes", tags, 200.0),
    ]
    assert ("vswin_bad_samples", tags, 2) in told
