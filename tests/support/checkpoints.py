"""Checkpoints of tensors that a test makes up, and the whole moments of an engine's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vswin_dist.device import Rank
from vswin_dist.lease import UNFENCED, Fence
from vswin_dist.model_card import ModelCard
from vswin_dist.training.checkpoint import CheckpointWriter, Part, Position, Saved, State
from vswin_dist.training.engine import Engine

ALONE = Rank(0, 1, torch.device("cpu"))


def state_of(weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> State:
    """What one rank alone gives to a checkpoint."""
    parts = [Part(name, tuple(t.shape), 0, t.reshape(-1)) for name, t in moments.items()]
    return State({name: tuple(t.shape) for name, t in weights.items()}, weights.items(), parts)


def save(
    root: str,
    position: Position,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    card: ModelCard,
    fence: Fence = UNFENCED,
) -> str:
    """Save and wait until it is committed, all others staying; the URL."""
    saved: list[Saved] = []
    writer = CheckpointWriter(root, ALONE, keep=1 << 30, on_saved=saved.append, fence=fence)
    writer.claim()
    writer.save(position, state_of(weights, moments), card)
    writer.finish()
    return saved[0].url


def whole_moments(engine: Engine) -> dict[str, Tensor]:
    """The moments of all ranks, joined; each value must be with one of them. Collective."""
    mine = [(p.name, p.shape, p.start, p.values.cpu().clone()) for p in engine.moments()]
    everyone = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: dict[str, Tensor] = {}
    for name, shape, start, values in (part for each in everyone for part in each):
        whole = found.setdefault(name, torch.full(shape, torch.nan)).view(-1)
        assert whole[start : start + len(values)].isnan().all(), f"{name} is held twice"
        whole[start : start + len(values)] = values
    assert not any(t.isnan().any() for t in found.values())
    return found


def flip_a_bit(file: Path) -> None:
    """Damage a file in its middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
