"""The paper's ablations: the rows of a table, the user's own trainings of them, and both side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from vswin_dist import models, storage
from vswin_dist.config import Settings, load_settings
from vswin_dist.errors import ConfigError, nearest
from vswin_dist.manifest import Manifest, read_manifest
from vswin_dist.tracking import provenance, run
from vswin_dist.training import checkpoint, identity
from vswin_dist.training.start import model_overrides

CLASSES = 400  # of Kinetics-400, where no data are named


@dataclass(frozen=True)
class Row:
    """A row of a table and what the paper reports: percentages at 4 clips x 3 crops, 10^9 MACs, 10^6 parameters."""

    table: int
    label: str
    top1: float
    top5: float
    gmacs: float | None = None  # None: not reported
    mparams: float | None = None

    @property
    def recipe(self) -> str:
        return f"ablation_table{self.table}_{self.label}"


ROWS = (
    Row(4, "joint", 78.8, 93.6, 88, 28.2), Row(4, "split", 76.4, 92.1, 83, 42.0), Row(4, "factorized", 78.5, 93.5, 95, 36.5),
    Row(5, "dim16_window16", 79.1, 93.8, 106, 28.5), Row(5, "dim8_window8", 78.5, 93.2, 44),
    Row(5, "dim4_window4", 76.7, 92.5, 20), Row(5, "dim16_window8", 78.8, 93.6, 88), Row(5, "dim16_window4", 78.6, 93.4, 79),
    Row(6, "3d", 78.8, 93.6), Row(6, "spatial", 78.5, 93.5), Row(6, "none", 78.1, 93.3),
    Row(7, "1k_ratio01", 80.6, 94.6), Row(7, "1k_ratio1", 80.2, 94.2),
    Row(7, "22k_ratio01", 82.6, 95.7), Row(7, "22k_ratio1", 82.0, 95.3),
    Row(8, "inflate", 78.8, 93.6), Row(8, "centre", 78.8, 93.7),
    Row(9, "duplicate", 78.8, 93.6), Row(9, "centre", 78.8, 93.6),
)


@dataclass(frozen=True)
class Trial:
    """A row as this user trains it."""

    row: Row
    settings: Settings

    @property
    def root(self) -> str:
        return storage.join(identity.runs_root(self.settings), self.settings.run.name)

    def is_finished(self) -> bool:
        """Whether this very training has ended.

        Raises:
            ConfigError: the training of this name was made with other settings or data.
        """
        s = self.settings
        known = identity.read_identity(self.root)
        if known is None or s.run.fresh or not known.finished:
            return False
        if known.settings["training.max_steps"] != s.training.max_steps:  # more steps: it goes on
            return False
        identity.check_same(known, s, read_manifest(s.data.train).fingerprint)
        return True

    def scores(self) -> tuple[float, float] | None:
        """(top-1, top-5) of the best checkpoint so far, in percent; None before the first score."""
        known = identity.read_identity(self.root)
        found = checkpoint.list_checkpoints(storage.join(self.root, known.run_id)) if known else []
        best = checkpoint.best(found)
        if best is None or "val/top1" not in best.position.metrics:
            return None
        return best.position.metrics["val/top1"], best.position.metrics["val/top5"]


def plan(table: int, labels: Sequence[str], name: str, overrides: Sequence[str]) -> list[Trial]:
    """The rows of `table` (those of `labels`, where given) as trainings called ``NAME_tableN_LABEL``.

    Args:
        overrides: ``key=value`` for every row, or ``PATTERN:key=value`` for those whose label matches, as in
            ``22k_*:model.init=FILE``.

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
            trials.append(Trial(row, load_settings(row.recipe, [*chosen, f"run.name={name}_table{table}_{row.label}"])))
    storage.use_s3_endpoint(trials[0].settings.storage.s3_endpoint)
    return trials


def _for_row(override: str, label: str, known: Sequence[str]) -> str | None:
    """`override` without its pattern where it is meant for the row `label`, else None."""
    pattern, colon, _ = override.partition("=")[0].rpartition(":")
    if not colon:
        return override
    if not any(fnmatch(k, pattern) for k in known):
        raise ConfigError(f"{override!r}: no row matches {pattern!r}. There are: {', '.join(known)}")
    return override[len(pattern) + 1:] if fnmatch(label, pattern) else None


def comparison(trials: Sequence[Trial], classes: int = CLASSES) -> str:
    """The trials beside the published figures, as a Markdown table; what is unknown is a dash."""
    lines = ["| training | top-1 / top-5 | published | MACs, G | published | parameters, M | published |",
             "|---|---|---|---|---|---|---|"]
    for trial in trials:
        row, s, scores = trial.row, trial.settings, trial.scores()
        with torch.device("meta"):
            model = models.build_model(s.model.name, num_classes=classes, **model_overrides(s))
        macs = models.count_macs(model, (s.data.frames, s.data.size, s.data.size), paper=True) / 1e9
        mine = f"{scores[0]:.1f} / {scores[1]:.1f}" if scores else "-"
        lines.append(f"| {s.run.name} | {mine} | {row.top1} / {row.top5} | {macs:.3g} | {row.gmacs or '-'} "
                     f"| {models.count_parameters(model) / 1e6:.1f} | {row.mparams or '-'} |")
    e = trials[0].settings.evaluation
    note = (f"Scores are of the validation set at {e.clips} x {e.crops} views, published ones of Kinetics-400 at 4 x 3; "
            f"parameters include a head of {classes} classes.")
    return "\n".join([*lines, "", note])


def log(trials: Sequence[Trial], text: str, train: Manifest) -> str:
    """Log the comparison `text` as a run of its own beside the rows' runs; returns the run's id."""
    s = trials[0].settings
    uri = run.tracking_uri(s.tracking.uri)
    run_id = run.open_run(uri, s.tracking.experiment, s.run.name.removesuffix(f"_{trials[0].row.label}"))
    run.log_start(uri, run_id, settings={"rows": [t.settings.run.name for t in trials]}, recipe=None,
                  source=provenance.source_version(Path(__file__).parents[2]), world_size=s.training.workers,
                  datasets=[run.DatasetRecord(train.name, train.fingerprint, s.data.train, "training", train.counts)],
                  files={"comparison.md": text})
    run.end_run(uri, run_id, "FINISHED")
    return run_id
