"""When a validation that no longer gets better ends a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SCORE = "val/top1"  # higher is better; what the best checkpoint is chosen by


@dataclass
class EarlyStop:
    """The evaluations without a better score, the same on every rank; kept in each checkpoint's position.

    Args:
        patience: how many end the training; None: it goes on to its last step.
    """

    patience: int | None
    best: float | None = None
    since: int = 0  # evaluations

    @property
    def is_due(self) -> bool:
        """True where the training ends here."""
        return self.patience is not None and self.since >= self.patience

    def see(self, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation."""
        if self.best is None or metrics[SCORE] > self.best:
            self.best, self.since = metrics[SCORE], 0
        else:
            self.since += 1
