"""When a validation that no longer gets better ends a training, and that it stays ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vswin_dist.config import load_settings, to_flat
from vswin_dist.errors import ConfigError
from vswin_dist.training import run_record
from vswin_dist.training.early_stop import EarlyStop
from vswin_dist.training.run_record import RunRecord


@pytest.mark.parametrize(
    ("patience", "ends"),
    [(1, 3), (2, 6), (3, None), (None, None)],  # equal is not better
)
def test_the_evaluation_that_ends_it(patience: int | None, ends: int | None) -> None:
    early = EarlyStop(patience)
    for number, top1 in enumerate((0.1, 0.5, 0.5, 0.6, 0.4, 0.6, 0.7), 1):
        early.see({"val/top1": top1})
        if early.is_due:
            assert number == ends
            return
    assert ends is None and early.since == 0


def test_an_early_end_is_an_end_until_there_is_more_patience(tmp_path) -> None:  # type: ignore[no-untyped-def]
    own = ["run.name=x", "data.train=/x", "data.val=/y"]
    s = load_settings("demo", [*own, "evaluation.patience=2"])
    record = RunRecord("", "f", to_flat(s), finished=True, step=6, stalled=2, number=1)
    run_record.write(str(tmp_path), record)
    with pytest.raises(ConfigError, match=r"is finished \(6 steps\).*evaluation\.patience=3 or more goes on"):
        run_record.to_resume(s, str(tmp_path), "f", 100)
    for more in ("evaluation.patience=3", "evaluation.patience=null"):
        assert run_record.to_resume(load_settings("demo", [*own, more]), str(tmp_path), "f", 100) == record
    run_record.write(str(tmp_path), replace(record, stalled=0))
    assert run_record.to_resume(s, str(tmp_path), "f", 100), "more steps are asked for"
