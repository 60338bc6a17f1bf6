"""A training that passed every check: what `planning.preflight` finds and `launch.train` starts from."""

from __future__ import annotations

from dataclasses import dataclass

from vswin_dist.config import Settings
from vswin_dist.data.plan import Plan
from vswin_dist.manifest import Manifest
from vswin_dist.training.identity import Identity
from vswin_dist.training.optim import ParameterGroup, groups_table


@dataclass(frozen=True)
class Prepared:
    """A training that can start, and its plan in figures."""

    settings: Settings  # with all that was left to the data decided
    tracking_uri: str
    root: str  # URL of ROOT/RUN
    resumes: Identity | None  # the training that this submission continues
    train: Manifest
    val: Manifest | None
    plan: Plan
    worlds: dict[int, int]  # numbers of ranks that the training may take -> accumulation steps
    parameters: int
    groups: list[ParameterGroup]
    load_report: str

    def summary(self) -> str:
        """The plan as text, for people."""
        s = self.settings
        steps = self.plan.steps_per_epoch
        val = f"{len(self.val.samples)} videos" if self.val else "none"
        return "\n".join([
            f"training {s.run.name!r}: {s.model.name}, {self.parameters:,} parameters, {len(self.train.classes)} classes",
            f"data: {self.plan.epoch_samples} of {len(self.train.samples)} videos ({self.train.fingerprint}), "
            f"validation {val}; balance {s.data.balance}, {s.data.repeats} times in a batch",
            f"clips: {s.data.frames} frames, {s.data.sampling} sampling",
            *(f"batch: {world} ranks x micro-batch {s.training.micro_batch} x accumulation {accumulation} = "
              f"{s.training.global_batch}" for world, accumulation in self.worlds.items()),
            f"steps: {steps} an epoch x {s.training.epochs} epochs = {steps * s.training.epochs}; "
            f"{self.plan.left_out} samples left out of each epoch",
            groups_table(self.groups, s.optim.lr)])
