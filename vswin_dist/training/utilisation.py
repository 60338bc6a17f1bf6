"""Model FLOPs utilisation: what a training computes, of what its devices could."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vswin_dist.config import Settings
from vswin_dist.device import Rank
from vswin_dist.models import VideoSwin, count_macs
from vswin_dist.planning.hardware import peak_flops


@dataclass(frozen=True)
class Utilisation:
    """What one optimizer step computes, and what all devices together could in a second; 0 where it is not known."""

    flops: float = 0.0
    peak: float = 0.0

    @classmethod
    def of(cls, model: VideoSwin, s: Settings, rank: Rank) -> Utilisation:
        """Count `model`: its forward pass once and its backward pass twice that, whatever is computed again."""
        if rank.device.type != "cuda" or s.training.precision != "bf16":
            return cls()
        peak = peak_flops(torch.cuda.get_device_name(rank.device))
        if not peak:
            return cls()
        return cls(step_flops(model, s), peak * rank.world_size)

    def metrics(self, seconds: float) -> dict[str, float]:
        """Return the metric of steps of `seconds`; none where the peak is not known."""
        return {"train/mfu": self.flops / seconds / self.peak} if self.peak else {}


def step_flops(model: VideoSwin, s: Settings) -> float:
    """Count the floating-point operations of one optimizer step: two for a multiply-accumulate."""
    clip = (s.data.frames, s.data.size, s.data.size)
    return 6.0 * count_macs(model, clip) * s.training.global_batch
