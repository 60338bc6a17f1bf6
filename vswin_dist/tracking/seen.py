"""What a tracking store says of a run, for those who only look: nothing is changed there, and nothing is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vswin_dist.errors import TrackingError
from vswin_dist.tracking import backend


@dataclass(frozen=True)
class SeenRun:
    """A run as its store has it."""

    status: str  # RUNNING, FINISHED, FAILED, KILLED
    metrics: dict[str, float]  # the last values
    step: int  # the last one of `train/loss`; 0: none


def look(uri: str, run_id: str) -> SeenRun:
    """Look at the run `run_id` in the store at `uri`.

    Raises:
        TrackingError: the store is away, or does not know the run.
    """
    database = Path(uri.removeprefix(backend.SQLITE).partition("?")[0])
    if uri.startswith(backend.SQLITE) and not database.exists():  # which a client would make
        raise TrackingError(f"cannot use MLflow at {backend.safe_uri(uri)}: there is no such file.")
    with backend.reachable(uri):
        run = backend.client(uri).get_run(run_id)
        last = run.data.to_proto().metrics
    steps = [int(m.step) for m in last if m.key == "train/loss"]
    return SeenRun(str(run.info.status), {m.key: float(m.value) for m in last}, max(steps, default=0))
