"""Metrics of every rank for Prometheus, which finds them at the port of Ray's agent on each node: `ray_vswin_...`.

They are set where a rank logs anyway, on those that log nowhere too; `infra/grafana/trainings.json` shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from vswin_dist import cluster
from vswin_dist.device import Rank
from vswin_dist.tracking import Run


@dataclass(frozen=True)
class Exported:
    """A metric as Prometheus gets it."""

    name: str
    text: str
    is_count: bool = False  # since the rank began: it only rises
    is_share: bool = False  # logged is that of all ranks together

    @property
    def series(self) -> str:
        """Its name there."""
        return f"ray_{self.name}_total" if self.is_count else f"ray_{self.name}"


EXPORTED = {  # by the name under which it is logged
    "train/clips_per_second": Exported("vswin_clips_per_second", "Clips that this rank takes in a second", is_share=True),
    "train/data_wait_share": Exported("vswin_data_wait_share", "Share of its time in which this rank waits for clips"),
    "time/data_s": Exported("vswin_data_wait_seconds", "Seconds of a step in which this rank waits for clips"),
    "checkpoint/wait_s": Exported("vswin_checkpoint_wait_seconds", "Seconds that the last save waited for the one before"),
    "checkpoint/snapshot_s": Exported("vswin_checkpoint_snapshot_seconds", "Seconds of the last copy to host memory"),
    "data/bad_videos": Exported("vswin_bad_samples", "Corrupt samples of the run so far, the same on all ranks"),
    "data/bytes_read": Exported("vswin_read_bytes", "Bytes of videos that this rank has read", is_count=True),
}


def export(tracking: Run, rank: Rank, run: str) -> None:
    """Have all that is logged to `tracking` on this rank set the metrics, too."""
    tags = {"run": run, "rank": str(rank.rank)}
    setters = {logged: _setter(exported, tags, rank.world_size) for logged, exported in EXPORTED.items()}
    tracking.listeners.append(partial(tell, setters))


def tell(setters: Mapping[str, Callable[[float], None]], metrics: Mapping[str, float]) -> None:
    """Hand the values of `metrics` to those of `setters` that are named as they are."""
    for name in setters.keys() & metrics.keys():
        setters[name](metrics[name])


def _setter(exported: Exported, tags: dict[str, str], ranks: int) -> Callable[[float], None]:
    if exported.is_count:
        return _Rise(cluster.counter(exported.name, exported.text, tags))
    set_value = cluster.gauge(exported.name, exported.text, tags)
    return (lambda value: set_value(value / ranks)) if exported.is_share else set_value


class _Rise:
    """Adds to a counter what a total has risen by."""

    def __init__(self, add: Callable[[float], None]) -> None:
        self._add, self._total = add, 0.0

    def __call__(self, total: float) -> None:
        if total > self._total:
            self._add(total - self._total)
        self._total = total
