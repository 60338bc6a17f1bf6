"""What a rank makes of the metrics of its steps, and what follows a step."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tests.support.checkpoints import state_of
from vswin_dist.config import load_settings
from vswin_dist.device import Rank
from vswin_dist.errors import DataError, WorkFailed
from vswin_dist.model_card import ModelCard
from vswin_dist.tracking import NullRun, RunReference
from vswin_dist.training import checkpoint, trainer
from vswin_dist.training.checkpoint import Position
from vswin_dist.training.engine import Engine
from vswin_dist.training.heartbeat import Heartbeat
from vswin_dist.training.step_metrics import Outcome, StepMetrics
from vswin_dist.training.trainer import Due, Trainer, WorkerConfig
from vswin_dist.training.utilisation import Utilisation

RANK = Rank(0, 1, torch.device("cpu"))


class Log(NullRun):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: Any) -> None:
        self.rows.setdefault(step, {}).update(metrics)


def config(*overrides: str, root: str = "/none") -> WorkerConfig:
    settings = load_settings("demo", ["data.train=/none", *overrides])
    return WorkerConfig(settings, root, RunReference("none", ""))


def a_trainer(log: Log, *overrides: str, steps: int = 18, val: Any = None, root: str = "/none") -> Trainer:
    """A trainer whose parts are left out that the methods under test do not use."""
    plan: Any = SimpleNamespace(
        global_batch=40, steps_per_epoch=4, rank_batch=lambda *_: SimpleNamespace(samples=np.array([7, 3]))
    )
    keys: Any = SimpleNamespace(samples=SimpleNamespace(value=lambda name, i: f"{name}-{i}"))
    ledger: Any = SimpleNamespace(metrics={}, check=lambda *_: None)
    loader: Any = SimpleNamespace(metrics={"data/bytes_read": 600.0})
    nothing: Any = None
    return Trainer(
        config(*overrides, root=root), RANK, keys, val, plan, nothing, loader, nothing, ledger, log, lambda *_: None, steps
    )


def metrics(step: int, loss: float, norm: float = 1.0) -> StepMetrics:
    return StepMetrics(step, torch.tensor(loss), torch.tensor(norm), {"lr/head": 0.5}, [])


def test_steps_have_the_mean_of_the_wall_time_until_the_device_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: 120.0)
    log = Log()
    t = a_trainer(log)
    t.pending, t.began = [metrics(6, 2.0), metrics(7, 1.0, norm=0.5)], 100.0
    t.timer._seconds |= {"data": 4.0, "forward": 10.0}
    t.utilisation = Utilisation(flops=30.0, peak=12.0)
    t.log_steps()
    assert t.pending == []
    assert log.rows[8] == {
        "train/loss": 1.0,
        "train/grad_norm": 0.5,
        "epoch": 2.0,
        "lr/head": 0.5,
        "train/clips_per_second": 4.0,
        "train/data_wait_share": 0.2,
        "time/data_s": 2.0,
        "time/forward_s": 5.0,
        "time/other_s": 3.0,
        "train/mfu": 0.25,
        "data/bytes_read": 600.0,
    }
    assert log.rows[7]["train/loss"] == 2.0 and log.rows[7]["train/clips_per_second"] == 4.0
    assert capsys.readouterr().out == "step 8/18  loss 1.5000  4.0 clips/s  data wait 20%  about 100 s left\n"


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "loss is nan at step 8"),
        (math.inf, 1.0, "loss is inf at step 8"),
        (1.0, math.inf, "the norm of the gradient is inf at step 8"),
        (1.0, -1.0, "the norm of the gradient is -1.0 at step 8"),
    ],
)
def test_what_is_not_finite_stops_the_run_before_it_is_logged(loss: float, norm: float, words: str, tmp_path: Path) -> None:
    log = Log()
    t = a_trainer(log, root=str(tmp_path))
    t.pending = [metrics(6, 1.0), metrics(7, loss, norm)]
    report = tmp_path / "not-finite-00000008.json"
    with pytest.raises(WorkFailed, match=f"{words}; .* are in {re.escape(str(report))}"):
        t.log_steps()
    assert log.rows == {}
    assert json.loads(report.read_text())["steps"] == [
        {
            "step": 8,
            "epoch": 1,
            "loss": str(loss),
            "gradient_norm": str(norm),
            "loss_of_each_rank": [str(loss)],
            "samples_of_each_rank": [["key-7", "key-3"]],
        }
    ]


@pytest.mark.parametrize("fault", ["loss", "corrupt samples"])
def test_the_checkpoint_in_flight_is_committed_before_an_error_of_all_ranks(fault: str, tmp_path: Path) -> None:
    t = a_trainer(Log(), root=str(tmp_path))
    t.writer.before_commit = lambda: time.sleep(0.3)
    t.writer.claim()
    position = Position(7, 1, 0, "run", "f" * 32, {"run.name": "x"}, [], {})
    t.writer.save(position, state_of({"w": torch.ones(3)}, {"exp_avg.w": torch.ones(3)}), ModelCard({}, ["a"], {}, {}))
    if fault == "loss":
        t.pending = [metrics(7, math.nan)]
    else:
        t.pending = [metrics(7, 1.0)]
        t.ledger.check = Mock(side_effect=DataError("too many"))  # type: ignore[method-assign]
    with pytest.raises((WorkFailed, DataError)):
        t.log_steps()
    assert [found.position.step for found in checkpoint.list_checkpoints(str(tmp_path))] == [7]


def test_skipped_steps_are_counted_until_there_are_too_many_in_a_row(tmp_path: Path) -> None:
    log = Log()
    t = a_trainer(log, "optim.max_skipped_steps=2", root=str(tmp_path))
    bad = {step: replace(metrics(step, math.nan, math.inf), outcome=Outcome(applied=False)) for step in range(2, 9)}
    t.pending = [metrics(1, 1.0), bad[2], bad[3], metrics(4, 1.0), bad[5], bad[6]]
    t.log_steps()
    assert log.rows[7]["train/skipped_steps"] == 4 and (t.skipped.total, t.skipped.in_row) == (4, 2)
    assert "train/loss" in log.rows[5] and not {"train/loss", "train/grad_norm"} & set(log.rows[4])
    t.pending = [bad[7]]
    with pytest.raises(WorkFailed, match=r"loss is nan at step 8, the 3\. in a row .*max_skipped_steps=2"):
        t.log_steps()
    steps = json.loads((tmp_path / "not-finite-00000008.json").read_text())["steps"]
    assert [s["step"] for s in steps] == [6, 7, 8]


def test_the_overflows_of_fp16_are_counted_and_no_row(tmp_path: Path) -> None:
    log = Log()
    t = a_trainer(log, "training.precision=fp16", "training.zero_stage=0", root=str(tmp_path))
    overflow, at_least = Outcome(False, True, 8.0), Outcome(False, False, 1.0)
    t.pending = [replace(metrics(step, 1.0, math.inf), outcome=overflow) for step in range(5)]
    t.log_steps()
    assert log.rows[5]["train/skipped_steps"] == 5 and log.rows[5]["train/loss_scale"] == 8.0
    assert log.rows[5]["train/loss"] == 1.0 and t.skipped.in_row == 0
    t.pending = [replace(metrics(5, 1.0, math.inf), outcome=at_least)]
    with pytest.raises(WorkFailed, match="the norm of the gradient is inf at step 6"):
        t.log_steps()


def test_an_update_that_is_not_finite_is_never_skipped(tmp_path: Path) -> None:
    t = a_trainer(Log(), "optim.max_skipped_steps=2", root=str(tmp_path))
    t.pending = [metrics(1, math.nan)]
    with pytest.raises(WorkFailed, match="loss is nan at step 2"):
        t.log_steps()


@pytest.mark.parametrize(
    ("done", "overrides", "due"),
    [
        (1, (), Due(log=False, evaluate=False, save=False)),
        (4, (), Due(log=True, evaluate=False, save=True)),  # an epoch of 4 steps ends
        (8, (), Due(log=True, evaluate=True, save=True)),  # the second, and every second is evaluated
        (8, ("training.checkpoint_every=3",), Due(log=True, evaluate=True, save=True)),  # what is evaluated is saved
        (3, ("training.checkpoint_every=3",), Due(log=True, evaluate=False, save=True)),
        (4, ("training.checkpoint_every=3",), Due(log=True, evaluate=False, save=False)),
        (18, ("training.checkpoint_every=100",), Due(log=True, evaluate=True, save=True)),  # the last step
    ],
)
def test_what_follows_a_step(done: int, overrides: tuple[str, ...], due: Due) -> None:
    assert a_trainer(Log(), "evaluation.every_epochs=2", *overrides, val=object()).due(done) == due


def test_steps_are_logged_when_ten_are_pending() -> None:
    t = a_trainer(Log(), "training.checkpoint_every=100")
    t.pending = [metrics(0, 1.0)] * 9
    assert not t.due(1).log
    t.pending = [metrics(0, 1.0)] * 10
    assert t.due(1).log


def test_nothing_is_evaluated_without_a_validation_set() -> None:
    assert not a_trainer(Log()).due(18).evaluate


@pytest.mark.parametrize("asked", [True, False])
def test_a_deterministic_run_begins_with_deterministic_algorithms(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(trainer, "be_deterministic", lambda: begun.append(True))
    with pytest.raises(DataError, match="no shards at /none"):
        Trainer.build(config(f"training.deterministic={str(asked).lower()}"), RANK, NullRun(), lambda *_: None, Heartbeat())
    assert begun == [True] * asked


def test_peak_memory_is_logged_at_the_last_step_that_was_done() -> None:
    log = Log()
    a_trainer(log, steps=18).log_memory(5)
    assert list(log.rows) == [5] and log.rows[5]["system/peak_memory_gib_rank_0"] > 0


def test_a_rank_that_fails_in_an_evaluation_waits_for_no_other() -> None:
    """The averaged weights go back by a collective operation, in which the others are not."""
    exchanged: list[str] = []
    engine: Any = SimpleNamespace(
        module=torch.nn.Linear(1, 1),
        stage=2,
        device=torch.device("cpu"),
        input_dtype=torch.float32,
        _exchange=lambda: exchanged.append("for the average"),
    )
    with pytest.raises(DataError), Engine.full_module(engine, averaged=True) as module:
        assert not module.training
        raise DataError("a shard is away")
    assert exchanged == ["for the average"] and engine.module.training
