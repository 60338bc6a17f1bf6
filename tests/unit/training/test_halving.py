"""Successive halving: which rows go on, and how far."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vswin_dist.config import load_settings, to_flat
from vswin_dist.errors import ConfigError
from vswin_dist.training import paper, run_record
from vswin_dist.training.halving import Halving
from vswin_dist.training.paper import Trial
from vswin_dist.training.run_record import RunRecord

STEPS = 90


def rows(root: Path, count: int, *settings: str) -> list[Trial]:
    own = [f"r{n}:optim.lr={n + 1}e-4" for n in range(count)]
    return paper.plan_own(
        "demo", [f"r{n}" for n in range(count)], "m", ["data.train=/x", f"storage.root={root}", *own, *settings]
    )


def quality(trial: Trial) -> float:
    """The row of the number 4 is the best, then 3 and 5."""
    return -abs(int(trial.label[1:]) - 4.1)


def all_of(halving: Halving) -> list[tuple[str, int | None]]:
    """Train one row after the other: (label, steps) of each."""
    found = []
    while trial := halving.take():
        found.append((trial.label, trial.settings.training.max_steps))
        assert trial.settings == load_settings(trial.recipe, list(trial.overrides))
        halving.give(trial, failed=False)
    return found


def test_a_third_goes_on_at_each_rung_and_the_best_to_the_end(tmp_path: Path) -> None:
    done = all_of(Halving(rows(tmp_path, 9), [STEPS] * 9, 3, 3, quality))
    assert [steps for _, steps in done].count(10) == 9
    # A row goes on as soon as it is of the best third of those that have come so far: r2 of three, r3 of four, r4 of five.
    assert [label for label, steps in done if steps == 30] == ["r2", "r3", "r4", "r5"]
    assert [label for label, steps in done if steps is None] == ["r4"]


def test_of_few_rows_one_is_trained_to_the_end(tmp_path: Path) -> None:
    done = all_of(Halving(rows(tmp_path, 2), [STEPS] * 2, 4, 2, quality))
    assert done == [("r0", 22), ("r1", 22), ("r1", None)]


def test_a_row_that_failed_or_has_no_score_goes_no_further(tmp_path: Path) -> None:
    halving = Halving(rows(tmp_path, 3), [STEPS] * 3, 2, 2, lambda trial: None if trial.label == "r1" else quality(trial))
    done = []
    while trial := halving.take():
        done.append((trial.label, trial.settings.training.max_steps))
        halving.give(trial, failed=trial.label == "r2")
    assert done == [("r0", 45), ("r1", 45), ("r2", 45), ("r0", None)]
    assert halving.table().splitlines()[2:] == [
        "| m_r0 | all steps | -4.1 |",
        "| m_r1 | 45 steps | - |",
        "| m_r2 | 45 steps | - |",
    ]


def test_one_waits_for_what_trains_where_that_may_let_another_go_on(tmp_path: Path) -> None:
    halving = Halving(rows(tmp_path, 2), [STEPS] * 2, 2, 2, quality)
    first, second = halving.take(), halving.take()
    assert first and second
    taken: list[Trial | None] = []
    waiting = threading.Thread(target=lambda: taken.append(halving.take()))
    waiting.start()
    halving.give(first, failed=False)
    waiting.join(0.2)
    assert waiting.is_alive() and not taken
    halving.give(second, failed=False)
    waiting.join(10)
    assert [t.label for t in taken if t] == ["r1"]
    ended = threading.Thread(target=lambda: taken.append(halving.take()))
    ended.start()
    halving.stop()
    ended.join(10)
    assert not ended.is_alive() and taken[-1] is None


@pytest.mark.parametrize(
    ("state", "left"),
    [
        # Half of four go on to 45 steps: r3 has, and r2 is next.
        ({"r0": (22, True), "r1": (22, True), "r2": (22, True), "r3": (45, True)}, ["r2/45", "r3"]),
        ({"r0": (22, True), "r1": (22, True), "r2": (22, True), "r3": (None, True)}, ["r2/45"]),
        # It was cut off.
        ({"r3": (45, False)}, ["r3/45", "r0/22", "r1/22", "r2/22", "r2/45", "r3"]),
        ({"r3": (22, False)}, ["r3/22", "r0/22", "r3/45", "r1/22", "r2/22", "r2/45", "r3"]),
        # It was tried before, for steps that are no rung: to the next one.
        ({"r3": (10, True)}, ["r3/22", "r0/22", "r3/45", "r1/22", "r2/22", "r2/45", "r3"]),
    ],
)
def test_the_same_command_goes_on_where_it_was(
    tmp_path: Path, state: dict[str, tuple[int | None, bool]], left: list[str]
) -> None:
    trials = rows(tmp_path, 4)
    for trial in trials:
        if trial.label in state:
            steps, finished = state[trial.label]
            settings = to_flat(trial.settings) | {"training.max_steps": steps}
            run_record.write(trial.root, RunRecord("", "f", settings, finished, step=steps or STEPS, number=1))
    totals = [None if state.get(t.label) == (None, True) else STEPS for t in trials]
    done = all_of(Halving(trials, totals, 2, 3, quality))
    assert [label if steps is None else f"{label}/{steps}" for label, steps in done] == left


def test_rows_that_begin_anew_each_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.fresh=true would begin each rung anew"):
        Halving(rows(tmp_path, 2, "run.fresh=true"), [STEPS] * 2, 2, 2)


def test_a_row_that_ended_early_goes_no_further(tmp_path: Path) -> None:
    """The best of all, by `evaluation.patience`: its training would refuse to go on."""
    trials = rows(tmp_path, 4, "data.val=/y", "evaluation.patience=2")
    halving, done = Halving(trials, [STEPS] * 4, 2, 2, quality), []
    while trial := halving.take():
        done.append((trial.label, trial.settings.training.max_steps))
        stalled = 2 if trial.label == "r3" else 0
        settings = to_flat(trial.settings)
        run_record.write(trial.root, RunRecord("", "f", settings, True, step=30, stalled=stalled, number=1))
        halving.give(trial, failed=False)
    assert done == [("r0", 45), ("r1", 45), ("r1", None), ("r2", 45), ("r2", None), ("r3", 45)]
