"""Find the trainings below a storage root, and tell what each is doing.

What storage holds of a run (its record, lease, progress, checkpoints, hangs) tells all but why a driver that is gone was
ended; MLflow knows that, and what trainings of earlier versions have left. Ray is never asked. Ages are by the clocks of
both sides.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from vswin_dist import lease, storage
from vswin_dist.data import quarantine
from vswin_dist.errors import TrackingError, VswinError
from vswin_dist.lease import Claim
from vswin_dist.tracking import NONE, seen, spool, tracking_uri
from vswin_dist.tracking.run import UNTRACKED
from vswin_dist.tracking.seen import SeenRun
from vswin_dist.tracking.sync import store
from vswin_dist.training import checkpoint, hangs, progress, run_record, stop_request
from vswin_dist.training.hangs import Hang
from vswin_dist.training.progress import Progress
from vswin_dist.training.run_record import RunRecord

AT_ONCE = 16  # runs that are looked at together
QUIET_S = 6 * progress.WRITE_S  # without a new record, after which there are no ranks
State = Literal["training", "hangs", "waits", "stopped", "failed", "finished", "unknown"]


@dataclass(frozen=True)
class Saved:
    """The newest whole checkpoint of a run."""

    url: str
    step: int
    age_s: float
    skipped_steps: int


@dataclass(frozen=True)
class Stored:
    """What storage holds of the newest training run of a name."""

    url: str
    record: RunRecord | None
    number: int = 0  # of the lease
    claim: Claim | None = None
    progress: Progress | None = None
    saved: Saved | None = None
    hang: Hang | None = None  # that is not published yet
    bad_videos: int = 0
    stopping: bool = False
    waiting: int = 0  # records that MLflow has not taken yet

    @property
    def driver_lives(self) -> bool:
        """Whether a driver holds the lease."""
        return self.claim is not None and self.claim.seems_alive


@dataclass(frozen=True)
class Training:
    """What is known of a training; None: it is not."""

    name: str
    url: str
    state: State
    step: int = 0  # steps done, as the ranks said last
    steps: int | None = None  # in all
    clips_per_second: float | None = None  # of the last steps, while it trains
    seconds_left: float | None = None  # by them
    ranks: int | None = None  # while there are some
    checkpoint: Saved | None = None  # None: there is none
    driver: str | None = None  # that holds the lease
    seen_s: float | None = None  # since its last sign of life
    bad_videos: int | None = None
    skipped_steps: int | None = None
    run_id: str | None = None  # in MLflow
    notes: list[str] = field(default_factory=list)


def find_trainings(root: str) -> Iterator[str]:
    """Find the folders of runs at or below `root`: a data root, a folder of runs, or one of them."""
    root = storage.absolute(root)
    if _is_run(root):
        yield root
        return
    runs = storage.join(root, "runs")
    if storage.list_names(runs) and not _is_run(runs):  # a data root
        root = runs
    urls = [storage.join(root, name) for name in storage.list_names(root)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from (url for url, is_run in zip(urls, pool.map(_is_run, urls), strict=True) if is_run)


def _is_run(url: str) -> bool:
    names = storage.list_names(url)
    return run_record.FILE in names or lease.FOLDER in names


def trainings(roots: Sequence[str], given_uri: str | None = None) -> tuple[list[Training], list[str]]:
    """Look at all trainings below `roots`; returns them, and what could not be asked.

    Args:
        given_uri: of the tracking store, where it is another than the runs name or needs a password; `none`: not asked.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        looks = list(pool.map(_looked, [url for root in roots for url in find_trainings(root)]))
    found, stores = list[Training](), _Stores(given_uri)
    for stored in looks:
        if isinstance(stored, Training):
            found.append(stored)
        elif stored.record or stored.driver_lives:  # else nothing was ever started
            found.append(_described(stored, stores))
    return found, list(stores.away.values())


def _looked(url: str) -> Stored | Training:
    try:
        return look(url)
    except VswinError as error:
        return Training(_name(url), url, "unknown", notes=[str(error)])


def look(url: str) -> Stored:
    """Read what storage holds of the run at `url`.

    Raises:
        VswinError: the storage is away, or a record there is not valid.
    """
    number, claim = lease.holder(storage.join(url, lease.FOLDER))
    record = run_record.read(url)
    if record is None:
        return Stored(url, None, number, claim)
    root = record.checkpoints(url)
    names = storage.list_names(root)
    return Stored(
        url,
        record,
        number,
        claim,
        progress.read(root) if progress.FILE in names else None,
        _newest_checkpoint(root),
        _hang(root) if hangs.FOLDER in names else None,
        storage.read_bytes(storage.join(root, quarantine.FILE)).count(b"\n") if quarantine.FILE in names else 0,
        _is_being_stopped(root, names, claim),
        sum(name.endswith(".json") for name in storage.list_names(storage.join(root, spool.FOLDER))),
    )


def _newest_checkpoint(root: str) -> Saved | None:
    for found in reversed(checkpoint.list_checkpoints(root, verbose=False)):
        with suppress(FileNotFoundError):  # it was removed meanwhile
            written = storage.modified(storage.join(found.url, checkpoint.COMMIT))
            return Saved(found.url, found.position.step, max(0.0, time.time() - written), found.position.skipped_steps)
    return None


def _hang(root: str) -> Hang | None:
    folder = storage.join(root, hangs.FOLDER)
    for start in storage.list_names(folder)[-1:]:
        if not storage.exists(storage.join(folder, start, hangs.PUBLISHED)):
            return hangs.read(storage.join(folder, start))
    return None


def _is_being_stopped(root: str, names: Sequence[str], claim: Claim | None) -> bool:
    for name in names:
        if claim and name.startswith(stop_request.PREFIX):
            with suppress(FileNotFoundError):  # just now it was
                return storage.modified(storage.join(root, name)) > claim.since  # else of a driver that was killed
    return False


class _Stores:
    """Tracking stores that are asked about runs; one that does not answer is not asked again."""

    def __init__(self, given: str | None) -> None:
        self.given = given
        self.away: dict[str, str] = {}  # URI -> why

    def look(self, record: RunRecord) -> tuple[SeenRun | None, str]:
        """Look at the run of `record`; None where it cannot be had, and why, if that is of this run alone."""
        uri = store(tracking_uri(record.settings.get("tracking.uri")), self.given)
        if uri == NONE or uri in self.away or not record.run_id or record.run_id.startswith(UNTRACKED):
            return None, ""
        try:
            return seen.look(uri, record.run_id), ""
        except TrackingError as error:
            if not error.retriable:
                return None, str(error)
            self.away[uri] = f"{error} What is said of its trainings is from storage alone."
            return None, ""


def _described(stored: Stored, stores: _Stores) -> Training:
    """Tell what the run is doing by what `stored` and its tracking store say."""
    now, record = time.time(), stored.record
    tracked, problem = stores.look(record) if record else (None, "")
    known, state = stored.progress, _state(stored, tracked, now)
    metrics = tracked.metrics if tracked else {}
    steps = record.step if record and record.finished else (record.steps if record else 0)
    step = record.step if state == "finished" and record else _steps_done(stored, tracked)
    training = Training(
        name=_name(stored.url),
        url=stored.url,
        state=state,
        step=step,
        steps=steps or None,
        ranks=known.ranks if known and state in ("training", "hangs") else None,
        checkpoint=stored.saved,
        driver=str(stored.claim) if stored.driver_lives else None,
        seen_s=max(0.0, now - stored.claim.renewed) if stored.claim else None,
        bad_videos=max(stored.bad_videos, int(metrics.get("data/bad_videos", 0))),
        skipped_steps=max(stored.saved.skipped_steps if stored.saved else 0, int(metrics.get("train/skipped_steps", 0))),
        run_id=record.run_id if record and not record.run_id.startswith(UNTRACKED) else None,
        notes=[*_notes(stored, state, now), *([problem] if problem else [])],
    )
    if state != "training" or record is None or (known and known.ended):
        return training
    batch, step_s = record.settings["training.global_batch"], known.step_s if known else 0.0
    rate = batch / step_s if step_s else metrics.get("train/clips_per_second")
    left = batch * (steps - step) / rate if steps and rate else None
    return replace(training, clips_per_second=rate, seconds_left=left)


def _state(stored: Stored, tracked: SeenRun | None, now: float) -> State:
    known = stored.progress
    if stored.record and stored.record.finished:
        return "finished"
    if stored.driver_lives:
        if stored.hang and known and known.number == stored.number:  # else of an earlier driver
            return "hangs"
        if known is None:  # of an earlier version, if it has saved something
            return "training" if stored.saved else "waits"
        if known.number != stored.number or known.error or (not known.ended and now - known.time > QUIET_S):
            return "waits"
        return "training" if known.ended or known.silent_s < known.limit_s else "hangs"
    if tracked and tracked.status in ("KILLED", "FAILED"):
        return "stopped" if tracked.status == "KILLED" else "failed"
    return "stopped" if known and known.ended and not known.error else "failed"


def _steps_done(stored: Stored, tracked: SeenRun | None) -> int:
    """Return how far the ranks are; they may be behind where earlier ones were, and MLflow too."""
    if stored.progress and stored.progress.step:
        return stored.progress.step
    if stored.saved:
        return stored.saved.step
    return tracked.step if tracked and stored.progress is None else 0


def _notes(stored: Stored, state: State, now: float) -> Iterator[str]:
    """Say what the state alone does not."""
    known, claim = stored.progress, stored.claim
    mine = known if known and known.number == stored.number else None  # of the ranks of this driver
    if state == "hangs" and stored.hang:
        yield str(stored.hang)
    elif mine and state in ("training", "hangs") and not mine.ended:
        if mine.phase in ("start", "evaluation", "checkpoint"):
            yield mine.phase
        if mine.silent_s > mine.limit_s / 5:
            yield f"silent for {mine.silent_s:.0f} of {mine.limit_s:.0f} s in {mine.phase} of step {mine.step + 1}"
    elif state == "training" and mine and not stored.stopping:
        yield "its last step is done: the best checkpoint is being registered"
    elif state == "waits" and mine:
        why = f"failed ({mine.error})" if mine.error else f"have said nothing for {now - mine.time:.0f} s"
        yield f"its ranks {why}: waits for others"
    elif state == "waits":
        yield "its ranks are not there yet: they start, or wait for room in the cluster"
    elif state == "failed":
        if mine and mine.error:
            yield mine.error
        elif claim and not claim.released:
            yield f"its driver is gone: {claim}"
    if stored.stopping and stored.driver_lives:
        yield "is being stopped"
    if stored.waiting:
        yield f"MLflow has not got all of it: python -m vswin_dist.tracking sync {stored.url}"


def _name(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]
