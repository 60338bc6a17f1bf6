"""Parameter groups and the learning-rate schedule, both pure functions of names and steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vswin_dist.config.schema import OptimSettings

BIAS_TABLE = "relative_position_bias_table"
HEAD = "head."


@dataclass(frozen=True)
class ParameterGroup:
    """Tensors that share a learning-rate factor (times the head's rate) and a weight decay."""

    label: str
    lr_factor: float
    weight_decay: float
    names: list[str]
    elements: int


def _factors(name: str, ndim: int, settings: OptimSettings) -> tuple[str, float, float]:
    """(label, learning-rate factor, weight decay) of one tensor.

    The backbone's factor holds for every tensor of it; norms, biases and bias tables are not decayed.
    """
    part, factor = ("head", 1.0) if name.startswith(HEAD) else ("backbone", settings.backbone_ratio)
    if ndim < 2 or name.endswith(BIAS_TABLE):
        return f"{part}_no_decay", factor, 0.0
    return part, factor, settings.weight_decay


def parameter_groups(parameters: Iterable[tuple[str, torch.Tensor]], settings: OptimSettings) -> list[ParameterGroup]:
    """Group ``(name, tensor)`` pairs; the order of the groups and of names in them is the model's.

    Source: paper, section 4.1 (backbone at 0.1x the head's learning rate).
    """
    found: dict[tuple[str, float, float], list[tuple[str, int]]] = {}
    for name, tensor in parameters:
        found.setdefault(_factors(name, tensor.ndim, settings), []).append((name, tensor.numel()))
    return [ParameterGroup(*key, [n for n, _ in rows], sum(e for _, e in rows)) for key, rows in found.items()]


def groups_table(groups: list[ParameterGroup], lr: float) -> str:
    """The groups as a Markdown table."""
    rows = ["| group | tensors | parameters | learning rate | weight decay |", "|---|---|---|---|---|"]
    rows += [f"| {g.label} | {len(g.names)} | {g.elements:,} | {g.lr_factor * lr:.3g} | {g.weight_decay:g} |"
             for g in groups]
    return "\n".join(rows)


def learning_rate_factor(step: int, steps_per_epoch: int, epochs: int, settings: OptimSettings) -> float:
    """The factor on every group's learning rate at `step` (0 for the first).

    Cosine from 1 to 0 over ``epochs``, times a linear warm-up from ``warmup_start`` over ``warmup_epochs``.
    """
    progress = min(step / (steps_per_epoch * epochs), 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    warmup_steps = settings.warmup_epochs * steps_per_epoch
    if step >= warmup_steps:
        return cosine
    return cosine * (settings.warmup_start + (1 - settings.warmup_start) * step / warmup_steps)
