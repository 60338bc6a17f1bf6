"""What is frozen does not change by a bit, and learns as if it began where it is freed; on ranks and over a restart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support import net
from tests.support.net import OPTIM
from tests.support.ranks import run_ranks
from vswin_dist.config.schema import TrainingSettings

STEPS, FREED = 6, net.EPOCH
FROZEN = replace(OPTIM, freeze=("body.0", "body.1.weight"), freeze_epochs=1, gradient_clipping=0.05)
NAMES = ("body.0.", "body.1.weight")


def frozen(precision: str) -> dict[int, Any]:
    """Of each stage: a whole training, one in two parts from within the frozen steps, and the weights while frozen."""
    found = {}
    for stage in range(4):
        training = TrainingSettings(zero_stage=stage, precision=precision)
        whole = net.train(training, FROZEN, 0, STEPS)
        first = net.train(training, FROZEN, 0, FREED - 1)
        second = net.train(training, FROZEN, FREED - 1, STEPS, first.state)
        same = {n: torch.equal(t, whole.state["weights"][n]) for n, t in second.state["weights"].items()}
        parts = first.losses + second.losses
        found[stage] = (whole.losses, parts, same, first.state, whole.state)
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_frozen_parameters_stay_and_are_freed_at_an_epoch(precision: str, tolerance: float) -> None:
    losses, weights = net.plain(FROZEN, STEPS, frozen=NAMES, thaw=FREED)
    torch.manual_seed(0)
    start = dict(net.Net().named_parameters())
    for ranks in run_ranks(2, frozen, precision):
        for stage, (found, parts, same, early, end) in ranks.items():
            assert found == pytest.approx(losses, abs=tolerance), stage
            assert parts == found and all(same.values()), stage
            for name, t in early["weights"].items():
                assert torch.equal(t, start[name]) == name.startswith(NAMES), (stage, name)
            assert {m.partition(".")[2] for m in early["moments"]} == {n for n in start if not n.startswith(NAMES)}
            assert {g["updates"] for g in end["groups"] if g["label"].endswith("_frozen")} == {STEPS - FREED}
            assert all(torch.allclose(end["weights"][n], weights[n], atol=tolerance) for n in weights), stage
