"""What a fault costs a training: found in what the run logged, and printed as a table after the tests."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.line import Line
from tests.support.waiting import below

RESUMED = re.compile(r"(pid=\d+)\).* resumed from \S*step-(\d{8})")
ON_ITS_WAY_S = 2.0  # from a step to its metrics' time: what was done when the fault came is no progress
HEADER = ("fault", "goes on after", "steps done again", "largest difference of a loss")


@dataclass
class Drill:
    """One training that is disturbed again and again."""

    line: Line
    name: str
    log: Path  # what all its submissions print, one after the other
    faults: list[tuple[str, float]] = field(default_factory=list)  # what happened, and when

    def committed(self) -> int:
        """The step of the newest checkpoint, 0 where there is none."""
        found = [path.parent.name for path in below(self.line.home / "runs" / self.name, "checkpoint.json")]
        return max((int(name[5:13]) for name in found if name.startswith("step-")), default=0)

    def happens(self, what: str) -> None:
        """Note a fault, just before it is made."""
        self.faults.append((what, time.time()))

    def rows(self, expected: Mapping[int, float] | None = None, uri: str | None = None) -> list[tuple[str, str, str, str]]:
        """A row for each fault; `expected` is step -> loss of the undisturbed training, where there was one.

        A step that was done before the fault is logged at that time, once: what is later and within the steps that were
        resumed from was done again.
        """
        from mlflow import MlflowClient

        history = MlflowClient(uri or self.line.uri).get_metric_history(
            self.line.run_of(self.name, uri).info.run_id, "train/loss"
        )
        at = {m.step: m.timestamp / 1000 for m in history}
        difference = f"{max(abs(m.value - expected[m.step]) for m in history):.1e}" if expected else "-"
        # Ray prints a line of a rank once for each node that has joined, where all of them are on one machine.
        resumed = [int(step) for step in dict(RESUMED.findall(self.log.read_text())).values()]
        assert len(resumed) == len(self.faults), f"{len(self.faults)} faults, resumed from {resumed}"
        found = []
        for (what, when), step in zip(self.faults, resumed, strict=True):
            again = sum(step < s and t <= when + ON_ITS_WAY_S for s, t in at.items())
            later = min(t for s, t in at.items() if step < s and t > when + ON_ITS_WAY_S)
            found.append((what, f"{later - when:.0f} s", str(again), difference))
        return found


def record(request: pytest.FixtureRequest, *row: str) -> None:
    """Add a row to the table: the fault, and the other columns of `HEADER`."""
    request.node.user_properties.append(("fault", row))


def table(reports: list[Any]) -> list[str]:
    """Lines of the table of all rows that tests have recorded."""
    rows = [HEADER, *(tuple(row) for report in reports for name, row in report.user_properties if name == "fault")]
    if len(rows) == 1:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
