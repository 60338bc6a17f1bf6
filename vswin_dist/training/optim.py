"""Parameter groups and the learning-rate schedule, both pure functions: of the parameters' roles, and of steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

from torch import nn

from vswin_dist.config.schema import OptimSettings
from vswin_dist.errors import ConfigError, nearest
from vswin_dist.models import ParameterRole


class Model(Protocol):
    """What grouping needs of a model: its parameters, and what each of them is."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) in the model's order."""

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """Say what each parameter is, by name."""


class Kind(NamedTuple):
    """What the parameters of a group have in common."""

    label: str
    lr_factor: float  # times the head's rate
    weight_decay: float
    frozen_epochs: float = 0  # at the start, without a change; infinity: all


@dataclass(frozen=True)
class ParameterGroup:
    """Tensors that share a learning-rate factor (times the head's rate) and a weight decay, and that are frozen together."""

    label: str
    lr_factor: float
    weight_decay: float
    names: list[str]
    elements: int
    frozen_epochs: float = 0  # at the start, without a change; infinity: all

    def as_record(self) -> dict[str, Any]:
        """Return the group as a checkpoint keeps it."""
        return {
            "label": self.label,
            "lr_factor": self.lr_factor,
            "weight_decay": self.weight_decay,
            "names": self.names,
        }


def _factors(role: ParameterRole, settings: OptimSettings) -> tuple[str, float, float]:
    """(label, learning-rate factor, weight decay) of one parameter, by `settings.param_groups`.

    - `clean`: the backbone's factor on every tensor of it; no decay on norms, biases and bias tables.
    - `official`: as the published code really trains. mmcv applies the longest matching key alone, and "backbone" is
      longer than "norm": bias tables have the head's rate and no decay, everything else in the backbone its factor *with*
      decay, norms and biases included.
    - `mmaction2`: every matching key multiplies: norms and bias tables are not decayed, and tables are slowed too;
      biases of linear layers and of the patch embedding are decayed.

    The head is decayed whole in the latter two. Temporal layers of the split and factorized designs, for which no code
    was published, are part of the backbone.
    """
    factor = 1.0 if role.part == "head" else settings.backbone_ratio
    if settings.param_groups == "official":
        return ("bias_tables", 1.0, 0.0) if role.kind == "bias_table" else (role.part, factor, settings.weight_decay)
    decayed = ("weight",) if settings.param_groups == "clean" else ("weight", "bias")
    if role.kind in decayed:
        return role.part, factor, settings.weight_decay
    return f"{role.part}_no_decay", factor, 0.0


def _kind(role: ParameterRole, last: int, frozen: bool, settings: OptimSettings) -> Kind:
    """Return what decides the group of one parameter; `last` is the depth of the head.

    The layer-wise decay multiplies what `param_groups` and `backbone_ratio` give. A part of the backbone then has its depth
    in its label, and a frozen one says so.

    Source: BEiT, and timm's `param_groups_layer_decay`: decay ** (depth of the head - depth).
    """
    label, factor, weight_decay = _factors(role, settings)
    if settings.layer_decay < 1 and role.part == "backbone":
        label, factor = f"{label}_{role.depth}", factor * settings.layer_decay ** (last - role.depth)
    if frozen:
        return Kind(f"{label}_frozen", factor, weight_decay, settings.freeze_epochs or math.inf)
    return Kind(label, factor, weight_decay)


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Find the parameters that a pattern names, or that belong to a module that it names.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    names = list(names)
    frozen: set[str] = set()
    for pattern in patterns:
        found = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        if not found:
            parts = [n.split(".") for n in names]
            known = dict.fromkeys(".".join(part[:length]) for part in parts for length in range(1, len(part) + 1))
            raise ConfigError(
                f"optim.freeze: {pattern!r} matches no parameter and no module.{nearest(pattern, known)} The model has "
                f"{', '.join(dict.fromkeys(part[0] for part in parts))}"
            )
        frozen |= found
    if frozen == set(names):
        raise ConfigError(f"optim.freeze={list(patterns)} leaves nothing to train: all {len(names)} parameters match")
    return frozen


def parameter_groups(model: Model, settings: OptimSettings) -> list[ParameterGroup]:
    """Group the parameters of a model; the order of the groups and of names in them is the model's.

    Raises:
        ConfigError: `optim.freeze` matches nothing, or everything.

    Source: paper, section 4.1 (backbone at 0.1x the head's learning rate); the published configurations' custom_keys
    under mmcv's DefaultOptimizerConstructor (`official`) and mmaction2's SwinOptimWrapperConstructor (`mmaction2`).
    """
    roles = model.parameter_roles()
    last = max(role.depth for role in roles.values())
    frozen = frozen_names(roles, settings.freeze or ())
    found: dict[Kind, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(_kind(roles[name], last, name in frozen, settings), []).append((name, parameter.numel()))
    return [
        ParameterGroup(k.label, k.lr_factor, k.weight_decay, [n for n, _ in rows], sum(e for _, e in rows), k.frozen_epochs)
        for k, rows in found.items()
    ]


def groups_table(groups: list[ParameterGroup], lr: float) -> str:
    """Write the groups as a Markdown table; a group that is frozen says for how long."""
    rows = ["| group | tensors | parameters | learning rate | weight decay |", "|---|---|---|---|---|"]
    rows += [
        f"| {g.label}{_frozen_for(g)} | {len(g.names)} | {g.elements:,} | {g.lr_factor * lr:.3g} | {g.weight_decay:g} |"
        for g in groups
    ]
    return "\n".join(rows)


def _frozen_for(group: ParameterGroup) -> str:
    if not group.frozen_epochs:
        return ""
    return "" if math.isinf(group.frozen_epochs) else f" for {group.frozen_epochs:g} epochs"


def learning_rate_factor(step: int, steps_per_epoch: int, epochs: int, settings: OptimSettings) -> float:
    """Compute the factor on every group's learning rate at `step` (0 for the first).

    Cosine from 1 to 0 over `epochs`, times a linear warm-up by step from `warmup_start` over `warmup_epochs`. With
    `schedule="epoch"` the cosine keeps the value of an epoch's first step through that epoch, as published: it never
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
