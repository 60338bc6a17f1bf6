"""Which training run a submission means: a new one, one to resume, or one that is finished.

`run.json` in `ROOT/RUN` holds the tracking run, the settings and the state of the newest training run of that name;
its checkpoints stand in `ROOT/RUN/NUMBER`, so that a fresh start leaves the earlier ones alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from vswin_dist import local_files, storage
from vswin_dist.config import Settings, from_flat, may_differ, to_flat
from vswin_dist.errors import CheckpointError, ConfigError
from vswin_dist.records import read_record
from vswin_dist.tracking import redact, spool

FILE = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """The newest training run of a name."""

    run_id: str  # of the tracking store; "" where nothing is tracked
    fingerprint: str  # of the training set
    settings: dict[str, Any]  # flat
    finished: bool = False
    step: int = 0  # steps done where finished
    stalled: int = 0  # evaluations without a better one that ended it early; 0: it went to its last step
    number: int = 0  # of its folder below ROOT/RUN; 0: of an earlier version, whose folders are named by the MLflow run
    steps: int = 0  # to be done in all; 0: of an earlier version, which did not say

    def checkpoints(self, root: str) -> str:
        """Return the URL of the folder of its checkpoints below `ROOT/RUN` = `root`."""
        return storage.join(root, f"{self.number:04d}" if self.number else self.run_id)

    def stalled_for(self, patience: int | None) -> bool:
        """Say whether it ended early, after at least `patience` evaluations without a better one."""
        return bool(patience) and self.stalled >= (patience or 0)


def runs_root(s: Settings) -> str:
    """Return where this user's runs stand: `storage.root`, else `runs` in the data root."""
    return storage.absolute(s.storage.root) if s.storage.root else str(local_files.home() / "runs")


def recorded(s: Settings) -> dict[str, Any]:
    """Return the settings as they stand on storage: flat, and without what gives access to the tracking store."""
    flat = to_flat(s)
    return flat | {"tracking.uri": s.tracking.uri and redact(s.tracking.uri)}


def registered_name(s: Settings) -> str:
    """Return the name under which the best model of a run is registered."""
    return s.tracking.register_as or s.run.name


def read(root: str) -> RunRecord | None:
    """Read the record of the newest run below `ROOT/RUN` = `root`; None where there is none.

    Raises:
        CheckpointError: it is not valid.
    """
    try:
        return read_record(storage.join(root, FILE), RunRecord, what="run record", error=CheckpointError)
    except FileNotFoundError:
        return None


def write(root: str, record: RunRecord) -> None:
    """Put `record` at `root`."""
    storage.put_bytes(storage.join(root, FILE), json.dumps(asdict(record), indent=1).encode())


def next_number(root: str) -> int:
    """Return the number of a new run below `root`: above the record's and those of all folders there."""
    known = read(root)
    folders = [int(name) for name in storage.list_names(root) if name.isdecimal()]
    return 1 + max([*folders, known.number if known else 0])


def to_resume(s: Settings, root: str, fingerprint: str, total_steps: int) -> RunRecord | None:
    """Find the run that this submission resumes; None for a new one.

    Raises:
        ConfigError: it is finished, or other settings or data are asked for than it was begun with.
    """
    known = None if s.run.fresh else read(root)
    if known is None:
        return None
    early = known.stalled_for(s.evaluation.patience)
    if known.finished and (early or known.step >= min(total_steps, s.training.max_steps or total_steps)):
        tracked = f"MLflow run {known.run_id}, " if known.run_id else ""
        waits = storage.list_names(storage.join(known.checkpoints(root), spool.FOLDER))
        sync = f"; MLflow has not got all of it yet: python -m vswin_dist.tracking sync {root}" if waits else ""
        more = f"; evaluation.patience={known.stalled + 1} or more goes on" if early else ""
        raise ConfigError(
            f"the training run {s.run.name!r} is finished ({tracked}{known.step} steps): "
            f"give run.fresh=true to train again, or another run.name{more}{sync}"
        )
    check_same(known, s, fingerprint)
    return known


def check_same(known: RunRecord, s: Settings, fingerprint: str) -> None:
    """Refuse to take `s` on the data `fingerprint` for the run `known`.

    Raises:
        ConfigError: it was begun with other settings or data.
    """
    if known.fingerprint != fingerprint:
        raise ConfigError(
            f"the training run {s.run.name!r} was begun on data {known.fingerprint}, {s.data.train} is "
            f"{fingerprint}: give another run.name, or run.fresh=true"
        )
    asked = to_flat(s)
    begun = to_flat(from_flat(known.settings))  # settings that are newer than the run have their defaults
    differing = [f"{k}: {begun[k]!r} -> {v!r}" for k, v in asked.items() if not may_differ(k) and begun[k] != v]
    if differing:
        raise ConfigError(
            f"the training run {s.run.name!r} was begun with other settings ({'; '.join(differing)}): "
            "give another run.name, or run.fresh=true"
        )
