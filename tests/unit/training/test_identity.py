"""Which training a submission continues, and which it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vswin_dist.config import load_settings, to_flat
from vswin_dist.errors import ConfigError
from vswin_dist.training.identity import Identity, read_identity, to_resume, write_identity


def known(root: Path, finished: bool = False, step: int = 0) -> Identity:
    identity = Identity("run1", "f1", to_flat(load_settings("demo", ["data.train=/x"])), finished, step)
    write_identity(str(root), identity)
    return identity


def resume(root: Path, *overrides: str, fingerprint: str = "f1") -> Identity | None:
    return to_resume(load_settings("demo", ["data.train=/x", *overrides]), str(root), fingerprint, 100)


def test_an_unfinished_training_goes_on_also_elsewhere_and_with_other_ranks(tmp_path: Path) -> None:
    assert resume(tmp_path) is None
    identity = known(tmp_path)
    assert read_identity(str(tmp_path)) == identity
    assert resume(tmp_path) == identity
    elsewhere = ["training.workers=1", "training.zero_stage=3", "data.train=/moved", "evaluation.clips=4"]
    assert resume(tmp_path, *elsewhere) == identity
    assert resume(tmp_path, "run.fresh=true") is None


@pytest.mark.parametrize(("overrides", "message"), [
    (["optim.lr=0.5"], "optim.lr: 0.001 -> 0.5"), (["run.seed=3"], "run.seed: 0 -> 3"),
    (["training.global_batch=32"], "training.global_batch: 16 -> 32"), (["data.flip=0.5"], "data.flip: 0.0 -> 0.5")])
def test_other_settings_make_another_training(tmp_path: Path, overrides: list[str], message: str) -> None:
    known(tmp_path)
    with pytest.raises(ConfigError) as error:
        resume(tmp_path, *overrides)
    assert message in str(error.value) and "run.fresh=true" in str(error.value)


def test_other_data_and_finished_trainings_are_refused(tmp_path: Path) -> None:
    known(tmp_path)
    with pytest.raises(ConfigError, match="begun on data f1"):
        resume(tmp_path, fingerprint="f2")
    identity = known(tmp_path, finished=True, step=100)
    with pytest.raises(ConfigError, match=r"is finished \(MLflow run run1, 100 steps\)"):
        resume(tmp_path)
    identity = known(tmp_path, finished=True, step=50)
    assert resume(tmp_path) == identity, "stopped early by max_steps: it goes on when more are asked for"
    with pytest.raises(ConfigError, match="is finished"):
        resume(tmp_path, "training.max_steps=50")
