"""A training run that passed every check: what `preflight` finds and `launch.train` starts from."""

from __future__ import annotations

from dataclasses import dataclass

from vswin_dist.config import Settings
from vswin_dist.data.plan import Plan
from vswin_dist.manifest import Manifest
from vswin_dist.training.optim import ParameterGroup, groups_table
from vswin_dist.training.run_record import RunRecord


@dataclass(frozen=True)
class TrainingSpec:
    """A training run that can start, in numbers."""

    settings: Settings  # with all that was left to the data decided
    tracking_uri: str
    root: str  # URL of ROOT/RUN
    resumes: RunRecord | None  # the run that this submission continues
    number: int  # of the run below `root`; 0: see RunRecord
    train: Manifest
    val: Manifest | None
    plan: Plan
    world_sizes: dict[int, int]  # numbers of ranks that the run may take -> accumulation steps
    parameters: int
    groups: list[ParameterGroup]
    load_report: str

    @property
    def last_step(self) -> int:
        """Return the number of steps of the run, where no evaluation ends it early."""
        total = self.plan.steps_per_epoch * self.settings.training.epochs
        return min(total, self.settings.training.max_steps or total)

    def summary(self) -> str:
        """Describe the run as text, for people."""
        s = self.settings
        steps = self.plan.steps_per_epoch
        val = f"{len(self.val.samples)} videos" if self.val else "none"
        batches = (
            f"batch: {world_size} ranks x micro-batch {s.training.micro_batch} x accumulation {accumulation} = "
            f"{s.training.global_batch}"
            for world_size, accumulation in self.world_sizes.items()
        )
        return "\n".join(
            [
                f"training {s.run.name!r}: {s.model.name}, {self.parameters:,} parameters, "
                f"{len(self.train.classes)} classes",
                f"data: {self.plan.epoch_samples} of {len(self.train.samples)} videos ({self.train.fingerprint}), "
                f"validation {val}; balance {s.data.balance}, {s.data.repeats} times in a batch",
                f"clips: {s.data.frames} frames, {s.data.sampling} sampling",
                *batches,
                f"steps: {steps} an epoch x {s.training.epochs} epochs = {steps * s.training.epochs}; "
                f"{self.plan.left_out} samples left out of each epoch",
                groups_table(self.groups, s.optim.lr),
            ]
        )
