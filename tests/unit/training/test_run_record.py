"""Which training a submission continues, and which it may not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vswin_dist.config import load_settings, to_flat
from vswin_dist.errors import ConfigError, PreflightError
from vswin_dist.training.launch import check_unchanged
from vswin_dist.training.run_record import FILE, RunRecord, next_number, read, recorded, to_resume, write


def known(root: Path, finished: bool = False, step: int = 0) -> RunRecord:
    record = RunRecord("run1", "f1", to_flat(load_settings("demo", ["data.train=/x"])), finished, step)
    write(str(root), record)
    return record


def resume(root: Path, *overrides: str, fingerprint: str = "f1") -> RunRecord | None:
    return to_resume(load_settings("demo", ["data.train=/x", *overrides]), str(root), fingerprint, 100)


def test_an_unfinished_training_goes_on_also_elsewhere_and_with_other_ranks(tmp_path: Path) -> None:
    assert resume(tmp_path) is None
    record = known(tmp_path)
    assert read(str(tmp_path)) == record
    assert resume(tmp_path) == record
    elsewhere = ["training.workers=1", "training.zero_stage=3", "data.train=/moved", "evaluation.clips=4"]
    assert resume(tmp_path, *elsewhere) == record
    assert resume(tmp_path, "run.fresh=true") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=0.5"], "optim.lr: 0.001 -> 0.5"),
        (["run.seed=3"], "run.seed: 0 -> 3"),
        (["training.global_batch=32"], "training.global_batch: 16 -> 32"),
        (["data.flip=0.5"], "data.flip: 0.0 -> 0.5"),
    ],
)
def test_other_settings_make_another_training(tmp_path: Path, overrides: list[str], message: str) -> None:
    known(tmp_path)
    with pytest.raises(ConfigError) as error:
        resume(tmp_path, *overrides)
    assert message in str(error.value) and "run.fresh=true" in str(error.value)


def test_other_data_and_finished_trainings_are_refused(tmp_path: Path) -> None:
    known(tmp_path)
    with pytest.raises(ConfigError, match="begun on data f1"):
        resume(tmp_path, fingerprint="f2")
    record = known(tmp_path, finished=True, step=100)
    with pytest.raises(ConfigError, match=r"is finished \(MLflow run run1, 100 steps\)"):
        resume(tmp_path)
    record = known(tmp_path, finished=True, step=50)
    assert resume(tmp_path) == record, "stopped early by max_steps: it goes on when more are asked for"
    with pytest.raises(ConfigError, match="is finished"):
        resume(tmp_path, "training.max_steps=50")


def test_checkpoints_lie_below_the_number_of_the_run(tmp_path: Path) -> None:
    assert next_number(str(tmp_path)) == 1
    assert RunRecord("run1", "f1", {}, number=12).checkpoints("s3://b/mine") == "s3://b/mine/0012"
    (tmp_path / "0007").mkdir()  # its record was lost
    (tmp_path / "3f0c9d").mkdir()  # of an earlier version
    assert next_number(str(tmp_path)) == 8
    write(str(tmp_path), RunRecord("run1", "f1", {}, number=9))  # which has no checkpoint yet
    assert next_number(str(tmp_path)) == 10


def test_a_run_of_an_earlier_version_is_found_below_its_mlflow_id(tmp_path: Path) -> None:
    settings = to_flat(load_settings("demo", ["data.train=/x"]))
    old = {"run_id": "3f0c9d", "fingerprint": "f1", "settings": settings, "finished": False, "step": 0}
    (tmp_path / FILE).write_text(json.dumps(old))
    record = resume(tmp_path)
    assert record and record.checkpoints("/runs/mine") == "/runs/mine/3f0c9d"


def test_a_setting_that_is_newer_than_the_run_had_its_default(tmp_path: Path) -> None:
    settings = to_flat(load_settings("demo", ["data.train=/x"]))
    del settings["optim.label_smoothing"]
    write(str(tmp_path), RunRecord("run1", "f1", settings))
    assert resume(tmp_path)
    with pytest.raises(ConfigError, match=r"optim.label_smoothing: 0.0 -> 0.1"):
        resume(tmp_path, "optim.label_smoothing=0.1")


def test_what_is_not_sent_yet_of_a_finished_training_is_said(tmp_path: Path) -> None:
    known(tmp_path, finished=True, step=100)
    (tmp_path / "run1" / "spool").mkdir(parents=True)
    (tmp_path / "run1" / "spool" / "0001-0-end-x.json").touch()
    with pytest.raises(ConfigError, match=f"is finished .* python -m vswin_dist.tracking sync {tmp_path}"):
        resume(tmp_path)


def test_a_training_that_another_driver_changed_after_the_checks_is_refused(tmp_path: Path) -> None:
    """Between the checks and the lease another one can have trained, and ended."""
    name = load_settings("demo", ["data.train=/x"])
    fresh: Any = SimpleNamespace(root=str(tmp_path), resumes=None, number=1, settings=name)
    check_unchanged(fresh)
    record = known(tmp_path)
    resumes: Any = SimpleNamespace(root=str(tmp_path), resumes=record, number=0, settings=name)
    check_unchanged(resumes)
    write(str(tmp_path), replace(record, number=1, finished=True))
    for spec in (fresh, resumes):
        with pytest.raises(PreflightError, match="was changed by another driver just now: give the command again"):
            check_unchanged(spec)


def test_what_gives_access_to_the_tracking_store_stands_in_no_record() -> None:
    s = load_settings("demo", ["data.train=/x", "tracking.uri=postgresql://user:pa55@db/mlflow"])
    assert "pa55" not in json.dumps(recorded(s)) and recorded(s)["tracking.uri"] == "postgresql://db/mlflow"
    assert recorded(s).keys() == to_flat(s).keys()
