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
SCATTERED = 1.4  # of a CPU's activations under ZeRO 3: weights come and go between them (measured, docs/benchmarks.md)
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

    @property
    def keeps_hidden(self) -> bool:
        """Whether the MLP's hidden layer is kept: the CPU's kernel recomputes it, where the weights are not partitioned."""
        return self.path != "cpu" or self.zero_stage == 3


def predict(architecture: Architecture, setup: Setup) -> Memory:
    """Predict the peak of a training step of `architecture` on one rank of `setup`."""
    parts = list(blocks(architecture, setup.clip, setup.micro_batch))
    head = (architecture.embed_dim << (len(architecture.depths) - 1)) * architecture.num_classes
    parameters = sum(b.parameters for b in parts) + head
    element, on_cpu = setup.element, setup.device == "cpu"
    split = setup.world_size if setup.zero_stage else 1
    gradient = 4 if setup.zero_stage == 0 else element
    peak = resident_peak(parts, architecture.gradient_checkpointing, setup)
    kept = gradient * parameters // (split if setup.zero_stage >= 2 else 1)
    if setup.zero_stage == 0:  # no buffer holds them
        kept = resident_peak(parts, architecture.gradient_checkpointing, setup, gradient) - peak
    weights = (4 if setup.zero_stage == 0 else element) * parameters
    if setup.zero_stage == 3:
        weights = weights // split + element * min(parameters, LIVE) * (2 if on_cpu else 1)  # in the heaps of both passes
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
        activations=peak,
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
    attention += block.heads * block.window**2 * setup.element  # the bias
    if setup.path == "plain" and setup.device == "cpu":  # scores are written out, as softmax leaves them
        attention += 2 * block.windowed * block.heads * block.window * setup.element
    else:
        attention += 4 * block.windowed * block.heads  # logarithms of the softmax's sums
    return block.tokens * row, attention, block.tokens * row * (10 if setup.keeps_hidden else 2) + norm


def held_by(parts: list[Block], checkpointing: GradientCheckpointing, setup: Setup) -> list[int]:
    """Bytes that each part keeps from its forward pass to its backward pass, by the mode of checkpointing."""
    kept = [kept_by(b, setup) for b in parts]
    if checkpointing == "selective":
        return [own + mlp for own, _, mlp in kept]
    if checkpointing == "block":
        return [sum(k) if b.merges else k[0] for b, k in zip(parts, kept, strict=True)]
    if checkpointing == "stage":
        first = {b.stage: i for i, b in reversed(list(enumerate(parts)))}
        return [kept[i][0] if first[b.stage] == i else 0 for i, b in enumerate(parts)]
    return [sum(k) for k in kept]


def again_by(parts: list[Block], checkpointing: GradientCheckpointing, setup: Setup) -> list[int]:
    """Bytes that each part computes in its forward pass and does not keep: its backward pass computes them again."""
    held = held_by(parts, checkpointing, setup)
    return [sum(kept_by(b, setup)) - h for b, h in zip(parts, held, strict=True)]


def step_peak(parts: list[Block], checkpointing: GradientCheckpointing, setup: Setup, gradient: int = 0) -> int:
    """Follow the backward pass from the last part to the first; returns the most bytes at one time.

    Args:
        gradient: bytes of a parameter's gradient, where those of a part come to be with its backward pass.
    """
    held, new = during_backward(parts, checkpointing, setup, gradient)
    return max(sum(held[: i + 1]) + n for i, n in enumerate(new))


def resident_peak(parts: list[Block], checkpointing: GradientCheckpointing, setup: Setup, gradient: int = 0) -> int:
    """As `step_peak`, of what a process has from the system: more on a CPU.

    There the backward pass has a thread of its own, and so a heap, into which nothing comes that the forward pass gave back.
    """
    if setup.device == "cuda":
        return step_peak(parts, checkpointing, setup, gradient)
    held, new = during_backward(parts, checkpointing, setup, gradient)
    peak = sum(held) + max(again_by(parts, checkpointing, setup)) + max(new)
    return int(peak * SCATTERED) if setup.zero_stage == 3 else peak


def during_backward(
    parts: list[Block], checkpointing: GradientCheckpointing, setup: Setup, gradient: int
) -> tuple[list[int], list[int]]:
    """Return by part what is held from the forward pass, and what its backward pass adds: recomputed, and gradients."""
    held, computed = held_by(parts, checkpointing, setup), again_by(parts, checkpointing, setup)
    new = []
    for i, b in enumerate(parts):
        again = computed[i]
        if checkpointing == "stage":  # of its stage all was computed again, and what comes later has been given back
            again = sum(c for p, c in zip(parts[: i + 1], computed[: i + 1], strict=True) if p.stage == b.stage)
        new.append(again + passing(b, setup) + gradient * sum(p.parameters for p in parts[i:]))
    held[0] += 2 * kept_by(parts[0], setup)[0]  # of the patch embedding: what it is given, and what its norm is
    return held, new


def passing(block: Block, setup: Setup) -> int:
    """Bytes of gradients under way inside a block: of its hidden layer or of q, k and v, and of what is added to it."""
    rows = block.tokens * block.channels * setup.element
    if block.merges:
        return 2 * rows
    # A CPU computes with transposed weights, and adds to the gradients of the MLP's what it has computed of them.
    weights = 16 * block.channels**2 * setup.element if setup.device == "cpu" else 0
    return 5 * rows + weights


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
