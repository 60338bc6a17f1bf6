"""Runs that were logged before, as a later job reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vswin_dist.errors import TrackingError
from vswin_dist.tracking import backend
from vswin_dist.tracking.run import RunReference, kind


@dataclass(frozen=True)
class LoggedRun:
    """What the store has of a run that ended well."""

    id: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]  # the last value of each


def finished_runs(uri: str, experiment: str, tags: Mapping[str, str]) -> list[LoggedRun]:
    """Find the finished runs of `experiment` that have all of `tags`, the newest first.

    Raises:
        TrackingError: the store is away or refuses.
    """
    if not kind(uri).registers:
        return []
    with backend.reachable(uri):
        found = backend.search_runs(uri, experiment, tags)
    return [LoggedRun(str(r.info.run_id), str(r.info.run_name), r.data.params, r.data.tags, r.data.metrics) for r in found]


def newest_run(uri: str, experiment: str, tags: Mapping[str, str]) -> str | None:
    """Find the newest run of `experiment` that has all of `tags`, however it ended; None where there is none.

    Raises:
        TrackingError: the store is away or refuses.
    """
    if not kind(uri).registers:
        return None
    with backend.reachable(uri):
        found = backend.search_runs(uri, experiment, tags, finished=False)
    return str(found[0].info.run_id) if found else None


def curves(reference: RunReference, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Read the values of metrics, as (step, value); without those that the store has none of, or does not tell now."""
    if not kind(reference.uri).registers:
        return {}
    try:
        with backend.reachable(reference.uri):
            found = {name: backend.history(reference.uri, reference.run_id, name) for name in names}
    except TrackingError:
        return {}
    return {name: [(int(m.step), float(m.value)) for m in values] for name, values in found.items() if values}


def fetch(uri: str, run_id: str, path: str, folder: Path) -> Path:
    """Copy the file `path` of a run into the local `folder`; returns where it is.

    Raises:
        TrackingError: the store is away, or has no such file. OSError: of a store without a server on another machine.
    """
    with backend.reachable(uri), backend.long_requests():
        return Path(backend.client(uri).download_artifacts(run_id, path, str(folder)))
