"""Steps whose loss or gradient is not finite: left out and counted where some are allowed, written down where not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vswin_dist import storage
from vswin_dist.data.plan import Plan
from vswin_dist.device import Rank
from vswin_dist.errors import StorageError, WorkFailed
from vswin_dist.manifest import Manifest
from vswin_dist.training.step_metrics import StepMetrics

FILE = "not-finite"  # how the names of the reports beside the checkpoints begin


def is_finite(loss: float, norm: float) -> bool:
    """Say whether a step was a sound one."""
    return math.isfinite(loss) and math.isfinite(norm) and norm >= 0  # DeepSpeed's -1 is a norm that is not finite


def fault_of(step: int, loss: float, norm: float) -> str:
    """Say what is not finite at a step."""
    what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"loss is {loss}"
    return f"{what} at step {step}"


@dataclass
class SkippedSteps:
    """The count of steps that were left out, the same on every rank.

    Args:
        allowed: how many in a row; with 0 the first one ends the training, after its update. In fp16, those by which the
            loss scale is found are not counted as a row.
        scaled: in fp16.
        root: URL of the folder of the checkpoints: the batches of a row that is too long are written down beside them.
    """

    allowed: int
    scaled: bool
    root: str
    plan: Plan
    manifest: Manifest
    total: int = 0
    loss_scale: float = 1.0
    in_row: int = 0  # up to the last step
    row: list[dict[str, Any]] = field(default_factory=list)  # what is known of these

    @property
    def metrics(self) -> dict[str, float]:
        """Return the count, and the loss scale in fp16; nothing where none is to be skipped."""
        counted = {"train/skipped_steps": float(self.total)} if self.allowed or self.scaled else {}
        return counted | ({"train/loss_scale": self.loss_scale} if self.scaled else {})

    def check(self, steps: Sequence[StepMetrics], found: Sequence[tuple[float, float]], rank: Rank) -> None:
        """Count the `steps` that are not finite by the (loss, norm) `found` of each, the same on all ranks. Collective.

        Raises:
            WorkFailed: too many in a row, or an update was made by a gradient that is not finite; names the report.
        """
        for metrics, (loss, norm) in zip(steps, found, strict=True):
            self.loss_scale = metrics.outcome.loss_scale
            if metrics.outcome.rescaled:
                self.total += 1
                continue
            if metrics.outcome.applied and is_finite(loss, norm):
                self.in_row, self.row = 0, []
                continue
            self.in_row += 1
            self.row.append(self._describe(metrics, loss, norm, rank))
            if metrics.outcome.applied or self.in_row > self.allowed:
                raise WorkFailed(self._report(fault_of(metrics.step + 1, loss, norm), metrics.step + 1, rank))
            self.total += 1
            fault = fault_of(metrics.step + 1, loss, norm)
            rank.print(f"{fault}: skipped; {self.in_row} in a row of {self.allowed} allowed, {self.total} in all")

    def _describe(self, metrics: StepMetrics, loss: float, norm: float, rank: Rank) -> dict[str, Any]:
        """Return all that is known of a step, as the report has it; numbers as texts, since JSON has no NaN. Collective."""
        ranks = [self.plan.rank_batch(metrics.step, r, rank.world_size).samples for r in range(rank.world_size)]
        keys = self.manifest.samples
        return {
            "step": metrics.step + 1,
            "epoch": metrics.step // self.plan.steps_per_epoch,
            "loss": str(loss),
            "gradient_norm": str(norm),
            "loss_of_each_rank": [str(v) for v in rank.gather(float(metrics.loss))],
            "samples_of_each_rank": [[str(keys.value("key", int(i))) for i in samples] for samples in ranks],
        }

    def _report(self, fault: str, step: int, rank: Rank) -> str:
        """Write the report, and return the message that names it. Collective."""
        url = storage.join(self.root, f"{FILE}-{step:08d}.json")
        where = f"its samples, losses and norms are in {url}"
        if rank.is_main:
            try:
                storage.put_bytes(url, json.dumps({"allowed": self.allowed, "steps": self.row}, indent=1).encode())
            except StorageError as error:
                where = f"its samples, losses and norms could not be written: {error}"
        where = rank.broadcast(where)  # and no rank ends the others before it is written
        if self.allowed:
            return (
                f"{fault}, the {self.in_row}. in a row that is not finite (optim.max_skipped_steps={self.allowed}); "
                f"{where}. Go on with a higher optim.max_skipped_steps, or start over (another run.name, or run.fresh=true) "
                "with a lower optim.lr, optim.gradient_clipping=1 or training.precision=fp32."
            )
        return (
            f"{fault}; no checkpoint was written from there on; {where}. Start over (another run.name, or "
            "run.fresh=true) with a lower optim.lr, optim.gradient_clipping=1 or training.precision=fp32; or go on from the "
            "last checkpoint with optim.max_skipped_steps=3, which leaves such steps out."
        )
