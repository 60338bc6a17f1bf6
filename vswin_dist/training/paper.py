"""Ablations: the rows of a table of the paper or of a user's own, the trainings of them, and the scores side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from vswin_dist import models, storage
from vswin_dist.config import Settings, load_settings
from vswin_dist.config.ablations import ROWS, Row
from vswin_dist.data.sampling import resolve
from vswin_dist.errors import ConfigError, before_start, nearest
from vswin_dist.manifest import read_manifest
from vswin_dist.tracking import DatasetRecord, Names, Run, check_store, newest_run, open_run, source_version, tracking_uri
from vswin_dist.training import checkpoint, run_record
from vswin_dist.training.initial_model import model_overrides

CLASSES = 400  # of Kinetics-400, where no data are named
BASE = "base"  # the row of a user's own table that changes nothing
KIND = "ablation"  # the tag of the run that is the parent of the rows'


@dataclass(frozen=True)
class Trial:
    """A row as this user trains it."""

    label: str
    recipe: str  # as `load_settings` knows it
    overrides: tuple[str, ...]  # of the recipe
    settings: Settings  # what these two make
    row: Row | None = None  # of the paper; None: of the user's own
    changes: str = "-"  # what sets a row of the user's own apart

    @property
    def root(self) -> str:
        return storage.join(run_record.runs_root(self.settings), self.settings.run.name)

    def is_finished(self) -> bool:
        """Whether this very training has ended.

        Raises:
            ConfigError: the training of this name was made with other settings or data.
        """
        s = self.settings
        known = run_record.read(self.root)
        if known is None or s.run.fresh or not known.finished:
            return False
        more = known.settings["training.max_steps"] != s.training.max_steps
        if more and not known.stalled_for(s.evaluation.patience):
            return False
        train = read_manifest(s.data.train)
        run_record.check_same(known, replace(s, data=resolve(s.data, train)[0]), train.fingerprint)
        return True

    def scores(self) -> tuple[float, float] | None:
        """(top-1, top-5) of the best checkpoint so far, in percent; None before the first score."""
        known = run_record.read(self.root)
        found = checkpoint.list_checkpoints(known.checkpoints(self.root)) if known else []
        best = checkpoint.best(found)
        if best is None or "val/top1" not in best.position.metrics:
            return None
        return best.position.metrics["val/top1"], best.position.metrics["val/top5"]


def plan(table: int, labels: Sequence[str], name: str, overrides: Sequence[str]) -> list[Trial]:
    """Return the rows of `table` (those of `labels`, where given) as trainings called `NAME_tableN_LABEL`.

    Args:
        overrides: `key=value` for every row, or `PATTERN:key=value` for those whose label matches, as in
            `22k_*:model.init=FILE`.

    Raises:
        ConfigError: no such table or row, a pattern of no row, or what `load_settings` refuses.
    """
    rows = [r for r in ROWS if r.table == table]
    if not rows:
        tables = sorted({r.table for r in ROWS})
        raise ConfigError(f"table {table}: the paper's ablations are tables {tables[0]} to {tables[-1]}")
    known = [r.label for r in rows]
    for label in labels:
        if label not in known:
            raise ConfigError(f"table {table} has no row {label!r}.{nearest(label, known)} There are: {', '.join(known)}")
    trials = []
    for row in rows:
        chosen = [o for o in (_for_row(override, row.label, known) for override in overrides) if o]
        if any(o.partition("=")[0].strip() == "run.name" for o in chosen):
            raise ConfigError("run.name would give all rows one name: use --name")
        if not labels or row.label in labels:
            trials.append(_trial(row.label, row.recipe, [*chosen, f"run.name={name}_table{table}_{row.label}"], row))
    storage.use_s3_endpoint(trials[0].settings.storage.s3_endpoint)
    return trials


def plan_own(recipe: str, labels: Sequence[str], name: str, overrides: Sequence[str]) -> list[Trial]:
    """Return the rows of a user's own table as trainings called `NAME_LABEL`: `base`, and one for each label in `overrides`.

    Args:
        labels: these rows alone, where given.
        overrides: `key=value` for every row, `LABEL:key=value` for one, `PATTERN:key=value` for those whose label matches.

    Raises:
        ConfigError: no row is named, no such row, or what `load_settings` refuses.
    """
    prefixes = (o.partition("=")[0].rpartition(":")[0] for o in overrides)
    known = list(dict.fromkeys([BASE, *(p for p in prefixes if p and not set(p) & set("*?["))]))
    if len(known) == 1:
        raise ConfigError(f"{recipe}: no row is named; give what each changes, as in low:optim.lr=1e-4 high:optim.lr=1e-2")
    for label in labels:
        if label not in known:
            raise ConfigError(f"there is no row {label!r}.{nearest(label, known)} There are: {', '.join(known)}")
    trials = []
    for label in labels or known:
        chosen = [o for o in (_for_row(override, label, known) for override in overrides) if o]
        if any(o.partition("=")[0].strip() == "run.name" for o in chosen):
            raise ConfigError("run.name would give all rows one name: use --name")
        trial = _trial(label, recipe, [*chosen, f"run.name={name}_{label}"])
        trials.append(replace(trial, changes=", ".join(o for o in chosen if o not in overrides) or "-"))
    storage.use_s3_endpoint(trials[0].settings.storage.s3_endpoint)
    return trials


def _trial(label: str, recipe: str, overrides: Sequence[str], row: Row | None = None) -> Trial:
    return Trial(label, recipe, tuple(overrides), load_settings(recipe, overrides), row)


def check_tracking(trials: Sequence[Trial]) -> None:
    """Refuse a store that could not take the comparison, before the rows are trained.

    Raises:
        PreflightError: it is away or refuses.
        ConfigError: its experiment cannot be used.
    """
    tracking = trials[0].settings.tracking
    with before_start():
        check_store(tracking_uri(tracking.uri), Names(experiment=tracking.experiment))


def _for_row(override: str, label: str, known: Sequence[str]) -> str | None:
    """`override` without its pattern where it is meant for the row `label`, else None."""
    pattern, colon, _ = override.partition("=")[0].rpartition(":")
    if not colon:
        return override
    if not any(fnmatch(k, pattern) for k in known):
        raise ConfigError(f"{override!r}: no row matches {pattern!r}. There are: {', '.join(known)}")
    return override[len(pattern) + 1 :] if fnmatch(label, pattern) else None


def comparison(trials: Sequence[Trial], classes: int = CLASSES) -> str:
    """Return the trials as a Markdown table, beside the published scores and counts if they are of the paper.

    What is unknown is a dash.
    """
    published = trials[0].row is not None
    head = ["training", "top-1 / top-5", *(["published"] if published else ["settings"])]
    head += ["MACs, G", *["published"] * published, "parameters, M", *["published"] * published]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for trial in trials:
        row, s, scores = trial.row, trial.settings, trial.scores()
        with torch.device("meta"):
            model = models.build_model(s.model.name, num_classes=classes, **model_overrides(s))
        macs = f"{models.count_macs(model, (s.data.frames, s.data.size, s.data.size), paper=True) / 1e9:.3g}"
        parameters = f"{models.count_parameters(model) / 1e6:.1f}"
        cells = [s.run.name, f"{scores[0]:.1f} / {scores[1]:.1f}" if scores else "-"]
        if row:
            cells += [f"{row.top1} / {row.top5}", macs, f"{row.gmacs or '-'}", parameters, f"{row.mparams or '-'}"]
        else:
            cells += [trial.changes.replace("|", "/"), macs, parameters]
        lines.append(f"| {' | '.join(cells)} |")
    e = trials[0].settings.evaluation
    theirs = ", published ones of Kinetics-400 at 4 x 3" if published else ""
    note = (
        f"Scores are of the validation set at {e.clips} x {e.crops} views{theirs}; "
        f"parameters include a head of {classes} classes."
    )
    return "\n".join([*lines, "", note])


@contextmanager
def parent(trials: Sequence[Trial]) -> Iterator[tuple[Run, int]]:
    """Open the run that those of the rows are shown below: that of earlier commands, where there are some; and end it.

    Yields:
        The run, and how many commands opened it before.

    Raises:
        PreflightError: the store is away or refuses.
    """
    with before_start():
        run, earlier = _open_parent(trials)
    try:
        yield run, earlier
    except BaseException as error:
        run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.end("FINISHED")


def _open_parent(trials: Sequence[Trial]) -> tuple[Run, int]:
    s = trials[0].settings
    name, experiment = s.run.name.removesuffix(f"_{trials[0].label}"), s.tracking.experiment
    uri = tracking_uri(s.tracking.uri)
    known = newest_run(uri, experiment, {"kind": KIND, "mlflow.runName": name})
    run = open_run(uri, experiment, name, known)
    train = read_manifest(s.data.train)
    earlier = run.start(
        settings={"rows": [t.label for t in trials], "recipe": s.recipe if trials[0].row is None else trials[0].row.base},
        recipe=None,
        source=source_version(Path(__file__).parents[2]),
        world_size=s.training.workers,
        datasets=[DatasetRecord(train.name, train.fingerprint, s.data.train, "training", train.counts)],
        tags={"kind": KIND},
    )
    return run, earlier


def log(run: Run, earlier: int, trials: Sequence[Trial], text: str) -> None:
    """Log the comparison `text` and the rows' scores to their parent, where `earlier` commands have logged theirs.

    Raises:
        TrackingError: the store is away or refuses.
    """
    run.artifact("comparison.md", text)
    for trial in trials:
        if scores := trial.scores():
            run.log(earlier, {f"{trial.label}/top1": scores[0], f"{trial.label}/top5": scores[1]})
    run.close()
