"""What Ray Train is told to leave out, and what is started for it."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from vswin_dist import cluster
from vswin_dist.cluster import FittingTrainer, Resources


def test_no_process_is_started_that_may_ask_another_cluster_or_serves_datasets() -> None:
    """By the names of Ray's own callbacks: another release may have them elsewhere."""
    trainer = FittingTrainer(print, world_sizes=(1,), scaling_config=ScalingConfig(num_workers=1))
    names = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert names and not [name for name in names if "Cleaner" in name or "Datasets" in name], names


def test_the_coordinator_starts_before_the_controller_that_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives it five seconds from the controller's first question, and imports can take longer."""
    begun: list[str] = []
    monkeypatch.setattr(cluster, "get_or_create_autoscaling_coordinator", lambda: begun.append("coordinator"))
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda self, **given: begun.append("controller"))
    FittingTrainer(print, world_sizes=(1,), scaling_config=ScalingConfig(num_workers=1))._initialize_and_run_controller()
    assert begun == ["coordinator", "controller"]


def test_a_signal_after_the_ranks_have_ended_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler passes over it, and ends with exit code 0 at the third."""

    def fit(_: TorchTrainer) -> SimpleNamespace:
        signal.signal(signal.SIGINT, lambda *_: None)
        return SimpleNamespace(metrics={"step": 3})

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    one = Resources(world_sizes=(1,), use_gpu=False, cpus_per_worker=1, max_failures=0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        assert cluster.run_ranks(print, {}, one, "x", str(tmp_path)) == {"step": 3}
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
