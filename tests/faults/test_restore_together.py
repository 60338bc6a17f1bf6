"""All ranks resume from the checkpoint that the main one has chosen, whatever each of them would see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tests.support.ranks import run_ranks
from tests.unit.training.test_checkpoint import save


def restored(root: str) -> tuple[int, list[Any]]:
    from vswin_dist.config import load_settings
    from vswin_dist.device import Rank
    from vswin_dist.tracking import NullRun, RunReference
    from vswin_dist.training.trainer import Trainer, WorkerConfig

    seen: list[Any] = []
    number = dist.get_rank()
    engine: Any = SimpleNamespace(
        load_weights=lambda tensors: seen.append(tensors["head.weight"][0, 0].item()),
        load_moments=lambda tensors, step, groups: seen.append(step),
        load_loss_scale=lambda state: None,
    )
    loader: Any = SimpleNamespace(load_state_dict=seen.append, accumulation=1)
    ledger: Any = SimpleNamespace(load=lambda: None, check=lambda *_: None)
    plan: Any = SimpleNamespace(epoch_samples=1, steps_per_epoch=1, left_out=0)
    own = root if number == 0 else f"{root}/a-listing-that-is-late"
    config = WorkerConfig(load_settings("demo", ["data.train=/none"]), own, RunReference("none", ""))
    rank, nothing = Rank(number, dist.get_world_size(), torch.device("cpu")), Any
    trainer = Trainer(
        config,
        rank,
        nothing,
        None,
        plan,
        engine,
        loader,
        nothing,
        ledger,
        NullRun(),
        nothing,
        last_step=9,  # type: ignore
    )
    return trainer.restore(), seen


def test_the_main_rank_chooses_for_all(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    half = tmp_path / "step-00000003"
    half.mkdir()
    assert run_ranks(2, restored, str(tmp_path)) == [(2, [2.0, 2, {"step": 4}])] * 2
    assert not half.exists()
