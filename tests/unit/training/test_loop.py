"""What a rank makes of the figures of its steps."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vswin_dist.config import load_settings, to_flat
from vswin_dist.errors import DataError, WorkFailed
from vswin_dist.evaluation.evaluate import Rank
from vswin_dist.training import loop

RANK = Rank(0, 1, torch.device("cpu"))
PLAN: Any = SimpleNamespace(global_batch=40, steps_per_epoch=4)


class Log:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, values: dict[str, float]) -> None:
        self.rows[step] = values


def figures(step: int, loss: float, norm: float = 1.0, waited: float = 0.0) -> loop.StepFigures:
    return loop.StepFigures(step, torch.tensor(loss), torch.tensor(norm), waited, {"lr/head": 0.5}, [])


def test_steps_share_the_wall_time_until_the_device_is_done(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loop.time, "perf_counter", lambda: 120.0)
    pending, log = [figures(6, 2.0, waited=3.0), figures(7, 1.0, norm=0.5, waited=1.0)], Log()
    assert loop.flush(pending, 100.0, PLAN, log, RANK, 18) == []  # type: ignore[arg-type]
    assert pending == []
    assert log.rows[8] == {"train/loss": 1.0, "train/grad_norm": 0.5, "epoch": 2.0, "lr/head": 0.5,
                           "train/clips_per_second": 4.0, "train/data_wait_share": 0.2}
    assert log.rows[7]["train/loss"] == 2.0 and log.rows[7]["train/clips_per_second"] == 4.0
    assert capsys.readouterr().out == "step 8/18  loss 1.5000  4.0 clips/s  data wait 20%  about 100 s left\n"


@pytest.mark.parametrize(("loss", "norm", "words"), [
    (math.nan, 1.0, "loss is nan at step 8"), (math.inf, 1.0, "loss is inf at step 8"),
    (1.0, math.inf, "the norm of the gradient is inf at step 8"), (1.0, -1.0, "the norm of the gradient is -1.0 at step 8"),
])
def test_what_is_not_finite_stops_the_training_before_it_is_logged(loss: float, norm: float, words: str) -> None:
    log = Log()
    with pytest.raises(WorkFailed, match=words):
        loop.flush([figures(6, 1.0), figures(7, loss, norm)], 0.0, PLAN, log, RANK, 18)  # type: ignore[arg-type]
    assert log.rows == {}


@pytest.mark.parametrize("asked", [True, False])
def test_a_deterministic_training_begins_with_deterministic_algorithms(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(loop, "be_deterministic", lambda: begun.append(True))
    settings = load_settings("demo", ["data.train=/none", f"training.deterministic={str(asked).lower()}"])
    with pytest.raises(DataError, match="no shards at /none"):
        loop.run(loop.Job(to_flat(settings), "", "", ""), RANK, lambda *_: None, None)
    assert begun == [True] * asked
