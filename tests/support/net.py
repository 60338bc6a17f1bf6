"""A small network that trains in the engine on any number of ranks, and the same training in plain PyTorch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.checkpoints import whole_moments
from vswin_dist.config.schema import OptimSettings, TrainingSettings
from vswin_dist.models import ParameterRole
from vswin_dist.training.engine import Engine
from vswin_dist.training.optim import parameter_groups

GLOBAL_BATCH = 8
EPOCH = 3  # steps
OPTIM = OptimSettings(lr=1e-2, backbone_ratio=0.1, gradient_clipping=1.0)
CPU = torch.device("cpu")
State = dict[str, Any]


class Net(nn.Module):
    """Sizes that divide by no world size, and four parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 11))
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        return self.head(self.body(x))

    def parameter_roles(self) -> dict[str, ParameterRole]:
        depths = {"body.0": 0, "body.1": 1, "body.3": 1, "head": 2}
        return {
            name: ParameterRole(
                "head" if name.startswith("head.") else "backbone",
                depths[name.rpartition(".")[0]],
                "weight" if p.ndim > 1 else "bias",
            )
            for name, p in self.named_parameters()
        }


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, 5, generator=g), torch.randint(0, 3, (GLOBAL_BATCH,), generator=g)


def rate(step: int) -> float:
    return 1 - step / 10


def poisoned(step: int, bad: Collection[int]) -> tuple[Tensor, Tensor]:
    """The batch of a step; in those of `bad`, one sample of the last rank is not a number."""
    x, y = batch(step)
    if step in bad:
        x[-1, 0] = torch.nan
    return x, y


@dataclass
class Trained:
    """What a training left."""

    engine: Engine
    state: State
    losses: list[float] = field(default_factory=list)  # of the global batches
    norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)


def train(
    training: TrainingSettings,
    optim: OptimSettings,
    first: int,
    last: int,
    state: State | None = None,
    bad: Collection[int] = (),
) -> Trained:
    """Train steps `first`..`last` from `state` on the ranks of this process group."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = Net()
    training = replace(training, workers=world_size, micro_batch=2)
    engine = Engine(model, parameter_groups(model, optim), training, optim, GLOBAL_BATCH // world_size // 2, CPU)
    if state:
        load(engine, state)
    found = Trained(engine, {})
    clips = GLOBAL_BATCH // world_size
    for step in range(first, last):
        engine.set_learning_rate(rate(step), step // EPOCH)
        x, y = poisoned(step, bad)
        total = torch.zeros(())
        for i in range(rank * clips, (rank + 1) * clips, 2):
            logits = engine.forward(x[i : i + 2].to(engine.input_dtype), torch.zeros(2, dtype=torch.int64))
            loss = nn.functional.cross_entropy(logits.float(), y[i : i + 2])
            engine.backward(loss)
            engine.step()
            total += loss.detach() / (GLOBAL_BATCH // 2)
        dist.all_reduce(total)
        found.losses.append(float(total))
        found.norms.append(float(engine.gradient_norm()))
        found.applied.append(engine.outcome.applied)
    found.state = save(engine, last)
    return found


def save(engine: Engine, step: int) -> State:
    return {
        "weights": {n: t.detach().clone() for n, t in engine.weights()},
        "moments": whole_moments(engine),
        "groups": engine.group_records(),
        "loss_scale": engine.loss_scale_state(),
        "step": step,
    }


def load(engine: Engine, state: State) -> None:
    engine.load_weights(state["weights"])
    engine.load_moments(state["moments"], state["step"], state["groups"])
    engine.load_loss_scale(state["loss_scale"])


def plain(
    optim: OptimSettings,
    last: int,
    bad: Collection[int] = (),
    frozen: tuple[str, ...] = (),
    thaw: int = 0,
    left_out: Collection[int] = (),
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the last weights of `last` steps in fp32 by PyTorch alone.

    A step that is not finite, or of `left_out`, is left out; what begins as one of `frozen` has no gradient before step
    `thaw`.
    """
    torch.manual_seed(0)
    model = Net()
    groups = [
        {
            "params": [p],
            "weight_decay": optim.weight_decay if p.ndim > 1 else 0.0,
            "ratio": 1.0 if name.startswith("head.") else optim.backbone_ratio,
        }
        for name, p in model.named_parameters()
    ]
    adamw, losses = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps), []
    for step in range(last):
        for name, p in model.named_parameters():
            p.requires_grad_(step >= thaw or not name.startswith(frozen or ("none of them",)))
        x, y = poisoned(step, bad)
        loss = nn.functional.cross_entropy(model(x, y), y)
        adamw.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), optim.gradient_clipping)
        for group in adamw.param_groups:
            group["lr"] = optim.lr * group["ratio"] * rate(step)
        if norm.isfinite() and step not in left_out:
            adamw.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters()}
