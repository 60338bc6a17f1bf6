"""Parameter groups and the learning-rate schedule, both pure functions of names and steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vswin_dist.config.schema import OptimSettings

BIAS_TABLE = "relative_position_bias_table"
NORM = "norm"  # of every norm's name and of no other
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
    """(label, learning-rate factor, weight decay) of one tensor, by `settings.param_groups`.

    - ``clean``: the backbone's factor on every tensor of it; no decay on norms, biases and bias tables.
    - ``official``: as the published code really trains. mmcv applies the longest matching key alone, and "backbone" is
      longer than "norm": bias tables have the head's rate and no decay, everything else in the backbone its factor *with*
      decay, norms and biases included.
    - ``mmaction2``: every matching key multiplies: norms and bias tables are not decayed, and tables are slowed too;
      biases of linear layers and of the patch embedding are decayed.

    The head is decayed whole in the latter two. Temporal layers of the split and factorized designs, for which no code
    was published, are part of the backbone.
    """
    part, factor = ("head", 1.0) if name.startswith(HEAD) else ("backbone", settings.backbone_ratio)
    table = name.endswith(BIAS_TABLE)
    if settings.param_groups == "official":
        return ("bias_tables", 1.0, 0.0) if table else (part, factor, settings.weight_decay)
    undecayed = ndim < 2 if settings.param_groups == "clean" else NORM in name
    if table or undecayed:
        return f"{part}_no_decay", factor, 0.0
    return part, factor, settings.weight_decay


def parameter_groups(parameters: Iterable[tuple[str, torch.Tensor]], settings: OptimSettings) -> list[ParameterGroup]:
    """Group ``(name, tensor)`` pairs; the order of the groups and of names in them is the model's.

    Source: paper, section 4.1 (backbone at 0.1x the head's learning rate); the published configurations' custom_keys
    under mmcv's DefaultOptimizerConstructor (``official``) and mmaction2's SwinOptimWrapperConstructor (``mmaction2``).
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

    Cosine from 1 to 0 over ``epochs``, times a linear warm-up by step from ``warmup_start`` over ``warmup_epochs``. With
    ``schedule="epoch"`` the cosine keeps the value of an epoch's first step through that epoch, as published: it never
    reaches 0, and the last epoch of 30 has 0.0027 of the peak.

    Source: mmcv's CosineAnnealingLrUpdaterHook (by epoch, min_lr 0) with its linear warm-up by iteration. Two details of
    it are left out: it counts micro-batches, which moves the warm-up by less than a step, and a warm-up that ends between
    two steps stays at its last rate (less than a step short of the peak) until the next epoch.
    """
    done = step // steps_per_epoch / epochs if settings.schedule == "epoch" else step / (steps_per_epoch * epochs)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    warmup_steps = settings.warmup_epochs * steps_per_epoch
    if step >= warmup_steps:
        return cosine
    return cosine * (settings.warmup_start + (1 - settings.warmup_start) * step / warmup_steps)
