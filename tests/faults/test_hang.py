"""A rank that hangs in an evaluation is ended and named; tests/faults/test_drill.py has one that hangs in a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.drill import record
from tests.support.ranks import run_ranks
from vswin_dist.config.schema import DataSettings
from vswin_dist.device import Rank
from vswin_dist.evaluation.evaluate import Views, evaluate
from vswin_dist.manifest import read_manifest
from vswin_dist.training import hangs


def evaluate_and_stop(folder: str, val: str) -> None:
    """Rank 1 is stopped in the second round."""
    rank, rounds = Rank(dist.get_rank(), 2, torch.device("cpu")), 0
    manifest = read_manifest(val)

    def forward(clips: torch.Tensor) -> torch.Tensor:
        if rank.rank == 1 and rounds == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return torch.zeros(len(clips), len(manifest.classes))

    with hangs.watched(folder, rank, 1.0) as heartbeat:

        def beat() -> None:
            nonlocal rounds
            rounds += 1
            heartbeat.beat("evaluation", 3)

        data = DataSettings(train=val, sampling="uniform", frames=4, size=32, short_side=32, workers=0)
        evaluate(forward, manifest, val, data, Views(1, 1, 2), rank, torch.float32, beat)


def test_a_rank_that_hangs_in_an_evaluation_is_ended_and_named(
    tmp_path: Path, motion_shards: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(AssertionError, match="was killed by 9"):
        run_ranks(2, evaluate_and_stop, str(tmp_path), f"{motion_shards}/val")
    [start] = (tmp_path / hangs.FOLDER).iterdir()
    found = hangs.read(str(start))
    assert found and found.silent == [1], found
    assert [(r.beat.phase, r.beat.step) for r in found.reports] == [("evaluation", 3)] * 2
    assert [r.waits for r in found.reports] == [True, False], "the other one waits for it"
    record(request, "a rank hangs in an evaluation: it is ended and named", "at a start", "0", "-")
