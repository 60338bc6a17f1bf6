"""What loading a checkpoint did to each tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

Shape = tuple[int, ...]

ACTIONS = ("taken", "inflated", "resized", "fresh", "dropped")


@dataclass(frozen=True)
class Row:
    """One tensor: taken as it is, inflated from 2D, resized, left fresh as initialised, or dropped.

    `source` is None for a tensor that the checkpoint lacks, `target` for one that the model lacks.
    """

    name: str
    action: str
    source: Shape | None
    target: Shape | None
    reason: str = ""


@dataclass
class LoadReport:
    """Rows in the model's order, then what was dropped; `str()` prints a table."""

    layout: str
    source: str
    rows: list[Row] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Count the tensors of each action."""
        found = Counter(row.action for row in self.rows)
        return {action: found[action] for action in ACTIONS}

    def __str__(self) -> str:
        head = ("tensor", "action", "checkpoint", "model", "reason")
        body = [(r.name, r.action, _text(r.source), _text(r.target), r.reason) for r in self.rows]
        table = [head, *body]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
        summary = ", ".join(f"{n} {action}" for action, n in self.counts().items())
        return "\n".join([f"{self.source}: layout {self.layout}", *lines, summary])


def _text(shape: Shape | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape)) or "scalar"
