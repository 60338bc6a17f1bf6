"""Predict the memory that one rank needs on its device, by what it is made of.

The states follow from the number of parameters, ZeRO's stage and the precision. Activations are counted block by block from
what PyTorch keeps for the backward pass on each path of `models.kernels`, and then followed through that pass: blocks free
theirs from the last to the first while gradients come to be, and a recomputed block has all of its own for a moment. How far
this is from measured peaks: docs/benchmarks.md, "Predicted memory".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from vswin_dist.choices import GradientCheckpointing
from vswin_dist.models.swin.presets import Architecture

Path = Literal["triton", "plain", "cpu"]  # of the attention, see `models.kernels.dispatch`
BUCKET = 500_000_000  # elements of DeepSpeed's buffer for gradients under way, by default
LIVE = 1_000_000_000  # parameters that ZeRO 3 keeps gathered at most, by default
CPU_PROCESS = 560 << 20  # of a rank that holds no model: its libraries (measured, docs/benchmarks.md)
CUDA_CONTEXT = 600 << 20  # of a process on a GPU outside PyTorch's allocator (assumed: 0.5 to 0.7 GiB on A100 and H100)


@dataclass(frozen=True)
class Block:
    """A residual block of a micro-batch, or what merges patches: its tokens, and its elements kept for each of them."""

    tokens: int  # of its grid
    windowed: int  # of its windows, padding included
    channels: int
    heads: int
    window: int  # tokens of a window
    parameters: int
    stage: int
    merges: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device at the peak of a training step."""

    process: int  # libraries, or the device's context
    weights: int
    gradients: int
    optimizer: int  # master weights and moments
    activations: int  # with what the backward pass computes from them
    communication: int  # buffers of DeepSpeed
    clips: int  # of the batch, as the model is given it

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Setup:
    """What memory depends on, beside the model."""

    clip: tuple[int, int, int]  # T, H, W
    micro_batch: int
    world_size: int
    zero_stage: int
    precision: str  # bf16, fp16 or fp32
    device: str  # cpu or cuda
    averages: bool = False  # an average of the weights is kept
    offloads: bool = False  # the optimizer's states lie in the host's memory

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def state(self) -> int:
        """Bytes that the optimizer keeps of a parameter: two moments, and the average where there is one."""
        return 12 if self.averages else 8

    @property
    def path(self) -> Path:
        """Which kernels compute the attention."""
        if self.device == "cuda":
            return "triton"
        return "cpu" if self.precision == "fp32" else "plain"


def predict(architecture: Architecture, setup: Setup) -> Memory:
    """Predict the peak of a training step of `architecture` on one rank of `setup`."""
    parts = list(blocks(architecture, setup.clip, setup.micro_batch))
    head = (architecture.embed_dim << (len(architecture.depths) - 1)) * architecture.num_classes
    parameters = sum(b.parameters for b in parts) + head
    element, on_cpu = setup.element, setup.device == "cpu"
    split = setup.world_size if setup.zero_stage else 1
    gradient = 4 if setup.zero_stage == 0 else element
    whole = gradient * parameters
    kept = whole // split if setup.zero_stage >= 2 else whole
    weights = (4 if setup.zero_stage == 0 else element) * parameters
    if setup.zero_stage == 3:
        weights = weights // split + element * min(parameters, LIVE)
    optimizer = optimizer_bytes(parameters, setup)
    communication = 0
    if setup.zero_stage:
        bucket = gradient * (min(BUCKET, parameters) if on_cpu else BUCKET)  # pages of a CPU exist once they are written
        communication = bucket * (1 if on_cpu else 2)  # two, while one is sent and the other filled
    return Memory(
        process=CPU_PROCESS if on_cpu else CUDA_CONTEXT,
        weights=weights,
        gradients=kept,
        optimizer=0 if setup.offloads and not on_cpu else optimizer,
        activations=step_peak(parts, architecture.gradient_checkpointing, setup),
        communication=communication,
        clips=3 * math.prod(setup.clip) * setup.micro_batch * (element + 4),
    )


def optimizer_bytes(parameters: int, setup: Setup) -> int:
    """Bytes of a rank's optimizer: its states, and under ZeRO the fp32 copy of the weights that it updates."""
    if setup.zero_stage == 0:
        return setup.state * parameters
    return (4 + setup.state) * parameters // setup.world_size


def blocks(a: Architecture, clip: tuple[int, int, int], micro_batch: int) -> Iterator[Block]:
    """Yield the parts of a model in the order of its computation, for `micro_batch` clips of (T, H, W)."""
    t, h, w = (-(-n // p) for n, p in zip(clip, a.patch_size, strict=True))
    for stage, depth in enumerate(a.depths):
        dim, heads = a.embed_dim << stage, a.num_heads[stage]
        window = [min(n, k) for n, k in zip((t, h, w), a.attention_window, strict=True)]
        padded = math.prod(-(-n // k) * k for n, k in zip((t, h, w), window, strict=True))
        tokens = micro_batch * t * h * w
        table = math.prod(2 * k - 1 for k in a.attention_window) * heads
        own = 12 * dim * dim + 13 * dim + table
        for _ in range(depth):
            yield Block(tokens, micro_batch * padded, dim, heads, math.prod(window), own, stage)
            if a.attention_design == "factorized":
                yield Block(tokens, tokens, dim, heads, t, 4 * dim * dim, stage)
        if stage + 1 < len(a.depths):
            h, w = (h + 1) // 2, (w + 1) // 2
            merged = micro_batch * t * h * w
            yield Block(merged, merged, 4 * dim, 1, 1, 8 * dim * dim + 8 * dim, stage, merges=True)


def kept_by(block: Block, setup: Setup) -> tuple[int, int, int]:
    """Bytes that a block keeps for its backward pass: its input, its attention with norm, its MLP with norm."""
    row = block.channels * setup.element
    if block.merges:
        return block.tokens * row, block.tokens * row, 0
    norm = 8 * block.tokens  # mean and scale of each token
    attention = 5 * block.windowed * row + norm  # windows, q, k and v, and the result
    if setup.path == "plain" and setup.device == "cpu":  # scores are written out, as softmax leaves them
        attention += 2 * block.windowed * block.heads * block.window * setup.element
    else:
        attention += 4 * block.windowed * block.heads  # logarithms of the softmax's sums
    hidden = 0 if setup.path == "cpu" else 8  # that of the CPU's kernel are recomputed
    return block.tokens * row, attention, block.tokens * row * (2 + hidden) + norm


def step_peak(parts: list[Block], checkpointing: GradientCheckpointing, setup: Setup) -> int:
    """Follow the backward pass from the last part to the first; returns the most bytes at one time."""
    whole = [sum(kept_by(b, setup)) for b in parts]
    inputs = [kept_by(b, setup)[0] for b in parts]
    if checkpointing == "selective":
        held = [kept_by(b, setup)[0] + kept_by(b, setup)[2] for b in parts]
    elif checkpointing == "block":
        held = [w if b.merges else i for b, w, i in zip(parts, whole, inputs, strict=True)]
    elif checkpointing == "stage":
        first = {b.stage: i for i, b in reversed(list(enumerate(parts)))}
        held = [inputs[i] if first[b.stage] == i else 0 for i, b in enumerate(parts)]
    else:
        held = whole
    peak = 0
    for i, b in enumerate(parts):
        again = whole[i] - held[i]
        if checkpointing == "stage":  # all of the stage is there once its last block is at work
            again = sum(w - k for p, w, k in zip(parts, whole, held, strict=True) if p.stage == b.stage)
        peak = max(peak, sum(held[: i + 1]) + again + passing(b, setup))
    return peak


def passing(block: Block, setup: Setup) -> int:
    """Bytes of gradients under way inside a block: of its hidden layer and of q, k and v."""
    row = block.channels * setup.element
    if block.merges:
        return 2 * block.tokens * row
    return (4 * block.tokens + (0 if setup.path == "cpu" else 4) * block.tokens) * row


def nearest_that_fit(architecture: Architecture, setup: Setup, limit: int, batch: int) -> list[str]:
    """Name settings that would fit into `limit` bytes: the nearest micro-batch, checkpointing mode and ZeRO stage.

    Args:
        batch: the samples of a rank in one step, which a micro-batch must divide.
    """
    found = []
    for micro_batch in sorted((m for m in range(1, setup.micro_batch) if batch % m == 0), reverse=True):
        if predict(architecture, replace(setup, micro_batch=micro_batch)).total <= limit:
            found.append(f"training.micro_batch={micro_batch}")
            break
    modes: tuple[GradientCheckpointing, ...] = ("selective", "block")
    for mode in modes:
        if mode != architecture.gradient_checkpointing:
            other = replace(architecture, gradient_checkpointing=mode)
            if predict(other, setup).total <= limit:
                found.append(f"model.gradient_checkpointing={mode}")
                break
    for stage in range(setup.zero_stage + 1, 4):
        if setup.world_size > 1 and predict(architecture, replace(setup, zero_stage=stage)).total <= limit:
            found.append(f"training.zero_stage={stage}")
            break
    return found
