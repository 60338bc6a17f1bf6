"""What feeding costs beside decoding: the plan, the first batch, the way from storage, and memory over many epochs.

Each function measures one metric and returns it; `jobs/benchmark.py loader` prints them.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch

from vswin_dist.config.schema import DataSettings
from vswin_dist.data.loader import Batch, TrainLoader
from vswin_dist.data.plan import Plan, make_plan
from vswin_dist.device import Rank
from vswin_dist.errors import DataError
from vswin_dist.manifest import read_manifest

MB = 1e6
ONE_RANK = Rank(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class PlanCost:
    """Seconds and peak memory in MB: of one rank's way to a late step, and of an epoch's samples for every rank."""

    rank_seconds: float
    rank_mb: float
    all_ranks_seconds: float
    all_ranks_mb: float

    def __str__(self) -> str:
        return (
            f"plan: {1e3 * self.rank_seconds:.1f} ms, {self.rank_mb:.1f} MB for one rank at any step; "
            f"{1e3 * self.all_ranks_seconds:.1f} ms, {self.all_ranks_mb:.1f} MB for an epoch of all ranks"
        )


def plan_cost(samples: int, ranks: int) -> PlanCost:
    """Measure the plan of `samples` samples on `ranks` ranks that take one sample each in a step."""

    def one_rank(seed: int) -> None:
        plan = Plan("one", samples, seed, ranks)
        next(plan.micro_batches(range(10 * plan.steps_per_epoch - 1, 10 * plan.steps_per_epoch), ranks - 1, ranks, 1))

    def all_ranks(seed: int) -> None:
        plan = Plan("all", samples, seed, ranks)
        order = plan.epoch_steps(3).samples
        assert sum(len(order[:, rank].tolist()) for rank in range(ranks)) == plan.steps_per_epoch * ranks

    found = []
    with tempfile.TemporaryDirectory() as folder, node_cache_at(folder):  # no order is there yet
        for work in (one_rank, all_ranks):
            began = time.perf_counter()
            work(0)
            found.append(time.perf_counter() - began)
            tracemalloc.start()
            work(1)
            found.append(tracemalloc.get_traced_memory()[1] / MB)
            tracemalloc.stop()
    return PlanCost(*found)


def _loader(data: DataSettings, batch: int, last: int | None = None) -> TrainLoader:
    manifest = read_manifest(data.train)
    plan = make_plan(manifest, data, 0, batch)
    return TrainLoader(manifest, data, plan, ONE_RANK, batch, last or plan.steps_per_epoch)


def first_batch(data: DataSettings, batch: int, step: int) -> float:
    """Measure the seconds from a loader that is to start at `step` to its first batch, its processes started."""
    loader = _loader(data, batch, step + 1)
    loader.load_state_dict(loader.state_dict() | {"step": step})
    began = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - began


def clips_per_second(data: DataSettings, batch: int, epochs: int = 1) -> list[float]:
    """Measure the rate of each of `epochs` epochs of one rank, the start of its processes left out."""
    loader = _loader(data, batch)
    steps = loader.last
    loader.last = steps * epochs
    batches, rates = iter(loader), []
    next(batches)
    for epoch in range(epochs):
        wanted = steps if epoch else steps - 1
        began = time.perf_counter()
        for _ in range(wanted):
            next(batches)
        rates.append(wanted * batch / (time.perf_counter() - began))
    return rates


@dataclass(frozen=True)
class ColdPasses:
    """Clips per second of first passes over the same shards in two locations, in turns."""

    here: list[float]
    there: list[float]  # members by offset
    copied: list[float]  # the same, from copies of whole shards on this disk as soon as they are there

    @property
    def ratio(self) -> float:
        """`there` as a fraction of `here`, of the medians."""
        return statistics.median(self.there) / statistics.median(self.here)

    @property
    def copied_ratio(self) -> float:
        """`copied` as a fraction of `here`, of the medians."""
        return statistics.median(self.copied) / statistics.median(self.here)

    def __str__(self) -> str:
        here, there, copied = (
            f"{statistics.median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in (self.here, self.there, self.copied)
        )
        return (
            f"first pass: {here} clips/s here; {there} there by offset: {self.ratio:.3f} of it; {copied} there with "
            f"copies of shards: {self.copied_ratio:.3f}"
        )


def cold_passes(data: DataSettings, other: str, batch: int, turns: int) -> ColdPasses:
    """Measure first passes over the shards `data.train`, and over those at `other` without and with copies, `turns` each.

    Raises:
        DataError: the two hold different sets.
    """
    here, there = (read_manifest(url) for url in (data.train, other))
    if here.fingerprint != there.fingerprint:
        raise DataError(
            f"{data.train} holds the set {here.fingerprint}, {other} the set {there.fingerprint}: compare "
            "copies of the same one"
        )
    room = 2 * sum(shard.bytes for shard in here.shards) / 1e9
    found = ColdPasses([], [], [])
    for _ in range(turns):
        for url, cache_gb, rates in ((data.train, 0.0, found.here), (other, 0.0, found.there), (other, room, found.copied)):
            with tempfile.TemporaryDirectory() as folder, node_cache_at(folder):
                rates += clips_per_second(replace(data, train=url, cache_gb=cache_gb), batch)
    return found


@contextmanager
def node_cache_at(folder: str) -> Iterator[None]:
    """Let `folder` be what this process and those that it starts take for the node's cache."""
    before = os.environ.get("VSWIN_CACHE")
    os.environ["VSWIN_CACHE"] = folder
    try:
        yield
    finally:
        del os.environ["VSWIN_CACHE"]
        if before is not None:
            os.environ["VSWIN_CACHE"] = before


@dataclass(frozen=True)
class MemorySlope:
    """MB held by this process and the loader's together after each epoch, and the slope after the third."""

    held_mb: list[float]
    slope_mb: float  # per epoch, least squares

    def __str__(self) -> str:
        return (
            f"loader memory: {self.held_mb[0]:.0f} MB after epoch 1, {self.held_mb[-1]:.0f} MB after epoch "
            f"{len(self.held_mb)}; {self.slope_mb:+.2f} MB an epoch after the third"
        )


def memory_slope(data: DataSettings, batch: int, epochs: int = 20) -> MemorySlope:
    """Measure resident memory over `epochs` epochs of one rank; pages that processes share count for each of them."""
    loader = _loader(data, batch)
    steps = loader.last
    loader.last = steps * (epochs + 1)  # its processes are still at work when the last epoch is measured
    held = []
    batches: Iterator[Batch] = iter(loader)
    for _ in range(epochs):
        for _ in range(steps):
            next(batches)
        held.append(_held() / MB)
    late = range(3, epochs)
    return MemorySlope(held, statistics.linear_regression(late, [held[i] for i in late]).slope)


def _held() -> int:
    here = psutil.Process()
    return sum(int(p.memory_info().rss) for p in (here, *here.children(recursive=True)))
