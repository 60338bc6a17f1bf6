"""Scores from probabilities; pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """What an evaluation found. Accuracies are percentages of the scored videos."""

    expected: int
    scored: int
    missing: list[tuple[str, str]]  # (key, reason)
    top1: float
    top5: float
    mean_class_accuracy: float
    loss: float  # mean negative log-probability of the true class

    def metrics(self) -> dict[str, float]:
        """As logged: val/top1 and so on."""
        return {
            "val/top1": self.top1,
            "val/top5": self.top5,
            "val/mean_class_accuracy": self.mean_class_accuracy,
            "val/loss": self.loss,
            "val/expected": self.expected,
            "val/scored": self.scored,
            "val/missing": len(self.missing),
        }

    def __str__(self) -> str:
        counts = f"expected {self.expected} / scored {self.scored} / missing {len(self.missing)}"
        return (
            f"top-1 {self.top1:.2f}%  top-5 {self.top5:.2f}%  mean class {self.mean_class_accuracy:.2f}%  "
            f"loss {self.loss:.4f}  ({counts})"
        )


def score(probabilities: NDArray[np.float64], labels: NDArray[np.int64], missing: list[tuple[str, str]]) -> Scores:
    """Scores of `probabilities` [N, classes], already averaged over views, against `labels` [N]."""
    n = len(labels)
    if n == 0:
        return Scores(len(missing), 0, missing, 0.0, 0.0, 0.0, float("nan"))
    k = min(5, probabilities.shape[1])
    ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    hit = ranked == labels[:, None]
    per_class = [hit[labels == c, 0].mean() for c in np.unique(labels)]
    truth = probabilities[np.arange(n), labels]
    return Scores(
        expected=n + len(missing),
        scored=n,
        missing=missing,
        top1=100 * float(hit[:, 0].mean()),
        top5=100 * float(hit.any(axis=1).mean()),
        mean_class_accuracy=100 * float(np.mean(per_class)),
        loss=float(-np.log(np.maximum(truth, 1e-12)).mean()),
    )
