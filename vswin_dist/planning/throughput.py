"""Predict the time of a training step, by its parts, for any number of GPUs, and say what more GPUs would still bring."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vswin_dist.planning.hardware import Coefficients, Gpu

WIDE = 192  # channels of swin_l's first stage, at which `Coefficients.share` is measured
BUCKET_BYTES = 1e9  # of gradients that DeepSpeed sends at once: the last one is sent when nothing is left to hide it


@dataclass(frozen=True)
class Work:
    """What a training asks of a GPU, whatever their number."""

    macs: int  # multiply-accumulates of one clip's forward pass
    blocks: int
    width: int  # channels of the first stage
    parameters: int
    element: int  # bytes of a weight and of a gradient as they are sent
    recomputed: float  # fraction of the forward pass that the backward pass repeats
    micro_batch: int
    zero_stage: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by what they are spent on; only what nothing else hides."""

    compute: float
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.compute + self.communication + self.optimizer


def micro_batch_time(work: Work, gpu: Gpu, c: Coefficients) -> float:
    """Seconds of a micro-batch forward and backward: by its operations, or by the host that starts them."""
    return max(computing(work, work.micro_batch, gpu, c), work.blocks * c.block_s * (1 + work.recomputed / 3))


def computing(work: Work, clips: int, gpu: Gpu, c: Coefficients) -> float:
    """Seconds that a GPU needs for the operations of `clips`, forward and backward."""
    share = c.share * math.pow(min(1.0, work.width / WIDE), c.narrow)
    return 2 * work.macs * clips * (3 + work.recomputed) / (share * gpu.peak)


def collective(size: float, gpus: int, gpu: Gpu, c: Coefficients, passes: int = 2) -> float:
    """Seconds to reduce `size` bytes over `gpus`: the faster of rings and a tree, as NCCL chooses.

    Args:
        passes: 2 for an all-reduce, 1 for a reduce-scatter or an all-gather alone.
    """
    if gpus == 1:
        return 0.0
    nodes = math.ceil(gpus / c.gpus_per_node)
    inside = min(gpus, c.gpus_per_node)
    sent = passes * (gpus - 1) / gpus * size
    # Inside of a node the link carries all of it; between nodes each GPU's interface carries its ring.
    carried = max(sent / gpu.link, sent / (inside * c.network) if nodes > 1 else 0.0)
    ring = carried + passes * (nodes - 1) * c.hop_s
    tree = 1.3 * carried + passes * math.ceil(math.log2(max(nodes, 2))) * c.hop_s  # in pieces that fill it less well
    return min(ring, tree)


def step_time(work: Work, gpus: int, accumulation: int, gpu: Gpu, c: Coefficients) -> StepTime:
    """Seconds of one optimizer step on `gpus`."""
    each = micro_batch_time(work, gpu, c)
    size = work.element * work.parameters
    backward = each * (2 + work.recomputed) / (3 + work.recomputed)
    if work.zero_stage == 3:  # weights come for the forward and for the backward pass, gradients go: for each micro-batch
        moved = accumulation * 3 * collective(size, gpus, gpu, c, passes=1)
        exposed = max(moved - 0.9 * accumulation * each, 0.1 * moved)
    else:
        reduce = collective(size, gpus, gpu, c, passes=1 if work.zero_stage else 2)
        last = collective(min(BUCKET_BYTES, size), gpus, gpu, c, passes=1 if work.zero_stage else 2)
        exposed = max(reduce - backward, last)
        if work.zero_stage:
            exposed += collective(size, gpus, gpu, c, passes=1)  # of the weights, after the update
    held = work.parameters / (gpus if work.zero_stage else 1)
    return StepTime(accumulation * each, exposed, 28 * held / 1.5e12)  # AdamW reads and writes 28 bytes of each parameter


@dataclass(frozen=True)
class Scale:
    """A training on some number of GPUs."""

    gpus: int
    global_batch: int
    accumulation: int
    step: StepTime

    @property
    def clips_per_second(self) -> float:
        """Over all GPUs."""
        return self.global_batch / self.step.total


def at_fixed_batch(work: Work, global_batch: int, gpus: int, gpu: Gpu, c: Coefficients) -> Scale | None:
    """Scale with the batch as it is, with smaller micro-batches where there are more GPUs; None where it does not divide."""
    if global_batch % gpus:
        return None
    own = global_batch // gpus
    micro_batch = max(m for m in range(1, min(work.micro_batch, own) + 1) if own % m == 0)
    accumulation = own // micro_batch
    smaller = Work(**{**work.__dict__, "micro_batch": micro_batch})
    return Scale(gpus, global_batch, accumulation, step_time(smaller, gpus, accumulation, gpu, c))


def at_fixed_load(work: Work, gpus: int, accumulation: int, gpu: Gpu, c: Coefficients) -> Scale:
    """Scale with a batch that grows with the number of GPUs."""
    return Scale(gpus, gpus * work.micro_batch * accumulation, accumulation, step_time(work, gpus, accumulation, gpu, c))


def limit(fixed: list[Scale], grown: list[Scale], global_batch: int, work: Work, gpu: Gpu, c: Coefficients) -> list[str]:
    """Say where more GPUs stop to pay, and why."""
    said = []
    paying = [s for s, before in zip(fixed[1:], fixed, strict=False) if _gain(s, before) > 1.5]
    last = paying[-1] if paying else fixed[0]
    reasons = []
    if last is fixed[-1]:
        reasons.append(f"training.global_batch={global_batch} leaves no clip for more GPUs")
    else:
        after = fixed[fixed.index(last) + 1]
        if after.step.communication > 0.3 * after.step.total:
            reasons.append("then the gradients' way takes more than the time that is saved")
        smallest = max(1, global_batch // after.gpus)
        if computing(work, smallest, gpu, c) < work.blocks * c.block_s:
            reasons.append("then a GPU has too few clips for the host to keep it busy")
    said.append(f"With this batch, {last.gpus} GPUs pay: {'; '.join(reasons) or 'twice as many bring less than half more'}.")
    full = grown[0].clips_per_second / grown[0].gpus
    worst = grown[-1]
    said.append(
        f"With a batch that grows with them, {worst.gpus:,} GPUs do {worst.clips_per_second / worst.gpus / full:.0%} of the "
        f"clips of {grown[0].gpus} for each GPU, in batches of {worst.global_batch:,}: whether those learn is unknown."
    )
    return said


def _gain(more: Scale, fewer: Scale) -> float:
    return more.clips_per_second / fewer.clips_per_second
