"""All ranks go on from the checkpoint that rank 0 has chosen, whatever each of them would see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tests.support.ranks import run_ranks
from tests.unit.training.test_checkpoint import save


def restored(root: str) -> tuple[int, list[Any]]:
    from vswin_dist.evaluation.evaluate import Rank
    from vswin_dist.training.loop import restore

    seen: list[Any] = []
    rank = dist.get_rank()
    engine: Any = SimpleNamespace(load_weights=lambda tensors: seen.append(tensors["head.weight"][0, 0].item()),
                                  load_moments=lambda tensors, step: seen.append(step))
    loader: Any = SimpleNamespace(load_state_dict=seen.append)
    own = root if rank == 0 else f"{root}/a-listing-that-is-late"
    return restore(engine, loader, own, Rank(rank, dist.get_world_size(), torch.device("cpu"))), seen


def test_rank_0_chooses_for_all(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    half = tmp_path / "step-00000003"
    half.mkdir()
    assert run_ranks(2, restored, str(tmp_path)) == [(2, [2.0, 2, {"step": 4}])] * 2
    assert not half.exists()
