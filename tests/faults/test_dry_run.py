"""A dry run on real nodes: every row of its table, and nothing left behind."""

from __future__ import annotations

from tests.support.line import SMALL, Line


def test_a_dry_run_looks_at_the_cluster_and_writes_nothing(cluster_line: Line) -> None:
    line = cluster_line
    line.without_store()
    output = line.run("train", "--recipe", "demo", "--dry-run", "run.name=dry", *line.sets(), *SMALL, "data.workers=1")
    rows = [text.split(" | ") for text in output.splitlines() if text.startswith("| ")]
    states = {row[0].removeprefix("| "): row[1] for row in rows}
    assert states["all-reduce of 2 ranks"] == states["versions"] == states["storage"] == states["clocks"] == "ok"
    assert any(what.startswith("memory of ") for what in states) and any(w.startswith("shared memory of") for w in states)
    assert not list((line.home / "runs").glob("dry/*")) and not list((line.home / "mlflow").glob("*.db"))
    more = ("run.name=dry", *line.sets(), *SMALL, "training.workers=8", "training.micro_batch=1")
    refused = line.run("train", "--recipe", "demo", "--dry-run", *more, code=2)
    assert "the Ray cluster has 2" in refused
