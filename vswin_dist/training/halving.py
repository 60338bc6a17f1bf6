"""Asynchronous successive halving (ASHA): rows of a sweep train for few steps, and the better ones for more.

Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020, algorithm 2. A row that goes on resumes its training
run from its last checkpoint, with the schedule of the whole run all along: what is compared is how far that has come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Condition

from vswin_dist.config import load_settings
from vswin_dist.errors import ConfigError
from vswin_dist.training import run_record
from vswin_dist.training.paper import Trial
from vswin_dist.training.run_record import RunRecord


@dataclass(frozen=True)
class Rung:
    """A number of steps at which rows are compared; None: the whole run."""

    steps: int | None

    def of(self, trial: Trial) -> Trial:
        """Return the row as it is trained up to here."""
        if self.steps is None:
            return trial
        overrides = (*trial.overrides, f"training.max_steps={self.steps}")
        return replace(trial, overrides=overrides, settings=load_settings(trial.recipe, list(overrides)))


def top1(trial: Trial) -> float | None:
    """Return the best top-1 of a row so far, in percent."""
    scores = trial.scores()
    return scores[0] if scores else None


def rungs(steps: int, eta: int, count: int) -> list[Rung]:
    """Divide a run of `steps` by `eta` from one rung to the one before it; fewer than `count` where steps do not suffice."""
    found = dict.fromkeys(steps // eta ** (count - 1 - k) for k in range(count - 1))
    return [*(Rung(at) for at in found if at), Rung(None)]


class Halving:
    """Which row trains next, and how far; shared by threads, of which each trains one at a time.

    Of the rows that have reached a rung, the best 1/`eta` go on to the next as soon as they are among these. One row is
    trained to the end, however few there are. What an earlier command has trained counts.

    Args:
        steps: of the whole run of each row; None: it has done them all.
        score: how good a row is, the higher the better; None where it has no score, and goes no further.

    Raises:
        ConfigError: a row asks for `run.fresh`, with which nothing goes on.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        steps: Sequence[int | None],
        eta: int,
        count: int,
        score: Callable[[Trial], float | None] = top1,
    ) -> None:
        self.eta, self._score = eta, score
        self.trials = {trial.label: trial for trial in trials}
        self.rungs: dict[str, list[Rung]] = {}
        self._scores: list[dict[str, float]] = [{} for _ in range(count)]
        self._begun: dict[str, int] = {}  # the rung up to which a row trains or has trained
        self._cut_off: list[tuple[str, int]] = []  # by the end of an earlier command
        self._ended_early: set[str] = set()  # of themselves, by `evaluation.patience`
        self._running: set[str] = set()
        self._stopped = False
        self._changed = Condition()
        for trial, total in zip(trials, steps, strict=True):
            if trial.settings.run.fresh:
                raise ConfigError("run.fresh=true would begin each rung anew: give other names (--name)")
            known = run_record.read(trial.root)
            self.rungs[trial.label] = rungs(total or (known.step if known else 1), eta, count)
            if known:
                self._recall(trial, known)

    def _recall(self, trial: Trial, known: RunRecord) -> None:
        """Take over what an earlier command has done with the row."""
        own, aim = self.rungs[trial.label], known.settings["training.max_steps"]
        at = next((k for k, rung in enumerate(own) if rung.steps == aim), None)
        compared = known.finished and at is not None
        if at is None:  # it was trained by itself, or by other rungs: to the next of these
            at = next(k for k, rung in enumerate(own) if rung.steps is None or rung.steps > (known.step or known.steps))
        for k in range(at):
            self._scores[k][trial.label] = math.inf  # it went on from there
        self._note_end(trial, known)
        if not compared and trial.label not in self._ended_early:
            self._cut_off.append((trial.label, at))
        elif (value := self._score(trial)) is not None:
            self._scores[at][trial.label] = value
        self._begun[trial.label] = at

    def _note_end(self, trial: Trial, known: RunRecord | None) -> None:
        if known and known.stalled_for(trial.settings.evaluation.patience):
            self._ended_early.add(trial.label)

    def take(self) -> Trial | None:
        """Return the row to train now, and how far; waits while one that trains may let another go on. None: all is done."""
        with self._changed:
            while not self._stopped:
                found = self._next()
                if found:
                    label, k = found
                    self._begun[label] = k
                    self._running.add(label)
                    return self.rungs[label][k].of(self.trials[label])
                if not self._running:
                    break
                self._changed.wait()
            return None

    def give(self, trial: Trial, failed: bool) -> None:
        """Say that the row `trial`, which was taken, has ended; one that failed goes no further."""
        value = None if failed else self._score(trial)
        known = run_record.read(trial.root)
        with self._changed:
            self._note_end(trial, known)
            self._running.discard(trial.label)
            if value is not None:
                self._scores[self._begun[trial.label]][trial.label] = value
            self._changed.notify_all()

    def stop(self) -> None:
        """Let no further row be taken."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _next(self) -> tuple[str, int] | None:
        if self._cut_off:
            return self._cut_off.pop()
        return self._promoted() or self._new() or (None if self._running else self._best_of_few())

    def _goes_on(self, label: str, k: int) -> bool:
        """Whether the row has not gone beyond rung `k`, and can."""
        if label in self._running or label in self._ended_early:
            return False
        return self._begun.get(label) == k and k + 1 < len(self.rungs[label])

    def _promoted(self) -> tuple[str, int] | None:
        for k in reversed(range(len(self._scores) - 1)):
            ranked = sorted(self._scores[k], key=self._scores[k].__getitem__, reverse=True)
            for label in ranked[: len(ranked) // self.eta]:
                if self._goes_on(label, k):
                    return label, k + 1
        return None

    def _new(self) -> tuple[str, int] | None:
        return next(((label, 0) for label in self.trials if label not in self._begun), None)

    def _best_of_few(self) -> tuple[str, int] | None:
        """Return the best row of the highest rung, where too few have reached it for a share of them to be one."""
        reached = [k for k, scores in enumerate(self._scores) if scores]
        if not reached:
            return None
        scores = self._scores[reached[-1]]
        best = max(scores, key=scores.__getitem__)
        return (best, reached[-1] + 1) if self._goes_on(best, reached[-1]) else None

    def table(self) -> str:
        """Return how far each row was trained, as a Markdown table; the furthest first."""
        lines = ["| training | trained for | top-1 there |", "|---|---|---|"]
        for label in sorted(self.trials, key=lambda x: -self._begun.get(x, -1)):
            k = self._begun.get(label)
            at = self.rungs[label][k].steps if k is not None else 0
            value = self._scores[k].get(label) if k is not None else None
            cells = [self.trials[label].settings.run.name, "all steps" if at is None else f"{at} steps"]
            lines.append(f"| {' | '.join(cells)} | {'-' if value is None else f'{value:.1f}'} |")
        return "\n".join(lines)
