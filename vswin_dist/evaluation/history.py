"""The evaluations of a registered model that its tracking store knows: for its description, and to decide by them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vswin_dist.errors import DataError, StorageError, TrackingError
from vswin_dist.evaluation.predictions import ALL, Predictions, read
from vswin_dist.tracking import LoggedRun, Registry, fetch, finished_runs

EXPERIMENT = "vswin-evaluations"
MOST = 12  # evaluations in a description
_SECTION = re.compile(r"\n*^## Evaluations\n\n(?:\|.*(?:\n|$))*", re.MULTILINE)


@dataclass(frozen=True)
class LoggedEvaluation:
    """One evaluation of a registered model."""

    run_id: str
    dataset: str  # its name and split; "" of earlier versions
    fingerprint: str
    clips: int
    crops: int
    shuffled: bool  # a control, which says nothing of the model's worth
    predictions: str  # URL of the file, which may be out of this machine's reach
    metrics: Mapping[str, float]

    @property
    def key(self) -> tuple[str, int, int]:
        """What two evaluations have in common that can be compared."""
        return self.fingerprint, self.clips, self.crops

    @property
    def row(self) -> str:
        """A line of the description's table."""
        scores = [self._score(name) for name in ("top1", "top5", "mean_class_accuracy")]
        frames = ", frames in random order" if self.shuffled else ""
        data = f"{self.dataset.replace('|', '/') or 'dataset'} `{self.fingerprint[:8]}`"
        return f"| {data} | {self.clips} x {self.crops}{frames} | {' | '.join(scores)} | {self.run_id} |"

    def _score(self, name: str) -> str:
        found, low, high = (self.metrics.get(f"test/{name}{end}") for end in ("", "_low", "_high"))
        between = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
        return "-" if found is None else f"{found:.2f}{between}"

    def read(self, uri: str) -> Predictions | None:
        """Read what was found of every video, where it was written or from the run; None where neither has all of it."""
        with tempfile.TemporaryDirectory(prefix="vswin-predictions-") as folder:
            for there in (True, False):
                try:
                    return read(self.predictions if there else str(fetch(uri, self.run_id, ALL, Path(folder))))
                except (DataError, StorageError, TrackingError, OSError):
                    continue  # moved, of another machine, or the best classes alone
        return None


def evaluations(uri: str, model: str) -> list[LoggedEvaluation]:
    """List the evaluations of `models:/NAME/VERSION`, the newest first.

    Raises:
        TrackingError: the store is away.
    """
    found = (_evaluation(run) for run in finished_runs(uri, EXPERIMENT, {"model": model}))
    return [e for e in found if e is not None]


def describe(uri: str, model: str) -> None:
    """Write the evaluations of `models:/NAME/VERSION` into its description, instead of those that stand there.

    Raises:
        TrackingError: the store is away or refuses. CheckpointError: there is no such version.
    """
    registry = Registry(uri)
    version = registry.find(model)
    newest: dict[object, LoggedEvaluation] = {}  # of those of the same views
    for evaluation in evaluations(uri, model):
        newest.setdefault((evaluation.key, evaluation.shuffled), evaluation)
    ordered = sorted(newest.values(), key=lambda e: e.shuffled)  # controls last
    rows = [e.row for e in ordered[:MOST]]
    registry.describe(version, with_evaluations(version.description, rows))


def with_evaluations(description: str, rows: list[str]) -> str:
    """Put the table of `rows` into a description, in the place of the one that it has; all else stays."""
    head = ["| data | views | top-1 (95% interval) | top-5 | mean class | run |", "|---|---|---|---|---|---|"]
    section = "\n".join(["## Evaluations", "", *head, *rows, ""])
    if found := _SECTION.search(description):
        before, after = description[: found.start()], description[found.end() :]
    else:
        before, after = description.rstrip("\n"), ""
    return (f"{before}\n\n" if before else "") + section + after


def _evaluation(run: LoggedRun) -> LoggedEvaluation | None:
    """Read a run; None where it does not say what an evaluation says."""
    try:
        return LoggedEvaluation(
            run.id,
            run.tags.get("dataset", ""),
            run.tags["dataset.test"],
            int(run.params["views.clips"]),
            int(run.params["views.crops"]),
            run.params.get("views.shuffle_frames") == "true",
            run.tags.get("predictions", ""),
            run.metrics,
        )
    except (KeyError, ValueError):
        return None
