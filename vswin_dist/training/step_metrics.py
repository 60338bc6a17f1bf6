"""What is measured at each optimizer step, and its mean over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from vswin_dist.data.quarantine import CorruptSample
from vswin_dist.device import Rank


class Outcome(NamedTuple):
    """What an optimizer step did, the same on all ranks."""

    applied: bool = True  # the weights were updated; else the gradient was not finite
    rescaled: bool = False  # which is to be expected in fp16: the loss scale was lowered
    loss_scale: float = 1.0  # of the step


@dataclass
class StepMetrics:
    """The metrics of one step on one rank. Tensors stay on the device until they are fetched: no step waits for it."""

    step: int
    loss: torch.Tensor  # mean over this rank's micro-batches
    grad_norm: torch.Tensor
    rates: dict[str, float]  # "lr/GROUP" -> learning rate
    corrupt: list[CorruptSample]  # samples of this rank's batches that did not decode
    outcome: Outcome = field(default_factory=Outcome)


def average(steps: list[StepMetrics], rank: Rank) -> tuple[list[tuple[float, float]], list[CorruptSample]]:
    """Average the losses over the ranks, in one operation; collective. The host waits for the device here.

    Returns:
        (loss, norm of the gradient) of each step, and the corrupt samples of all ranks: the same on each of them.
    """
    corrupt = [c for metrics in steps for c in metrics.corrupt]
    losses = torch.stack([*(m.loss for m in steps), torch.full((), float(len(corrupt)), device=rank.device)])
    if rank.world_size > 1:
        dist.all_reduce(losses)
        if losses[-1] > 0:
            corrupt = [c for part in rank.gather(corrupt) for c in part]
        losses /= rank.world_size
    found: list[tuple[float, float]] = torch.stack([losses[:-1], torch.stack([m.grad_norm for m in steps])]).T.tolist()
    return found, corrupt
