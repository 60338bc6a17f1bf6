"""What a manifest of many samples costs: bytes on disk, time to open, memory of processes and of a node, the plan.

`python jobs/benchmark.py manifest SHARDS --samples N`: the samples of SHARDS are repeated under names of their own until
there are N, so that the first batch is a real one. Every open and every process is a fresh one, as a loader's are.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vswin_dist.benchmarks import feeding
from vswin_dist.columns import BLOCK, Builder, Table, block_of
from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import DataError
from vswin_dist.manifest import Manifest, Sample, Shard, read_manifest, shard_url, write_manifest

MB = 1e6
SHARD_SAMPLES = 500  # of the repeated set: 256 MB of videos of half a megabyte
# A process that opens a manifest and reads of it what a loader's worker reads, says what that took, and stays.
PROCESS = """
import sys, time
import psutil
from vswin_dist.data.plan import Plan
from vswin_dist.manifest import read_manifest
url, part, parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
began = time.perf_counter()
samples = read_manifest(url).samples
opened = time.perf_counter() - began
opened_memory = psutil.Process().memory_full_info()
if parts and samples:
    for index in Plan("set", len(samples), 0, 1).order(0)[part::parts]:
        sample = samples.row(int(index))
        sample.shard, sample.offset, sample.size, sample.crc32, sample.class_id, sample.frames, sample.width, sample.height
memory = psutil.Process().memory_full_info()
print(opened, opened_memory.rss, opened_memory.uss, memory.rss, memory.uss, flush=True)
for line in sys.stdin:
    print(psutil.Process().memory_full_info().pss, flush=True)
"""


@dataclass(frozen=True)
class Costs:
    """Seconds and MB for one manifest. Memory is over that of processes that open one of no samples."""

    samples: int
    head_mb: float
    columns_mb: float
    node_copy_mb: float
    write_s: float
    first_open_s: float  # of a node: converts
    open_s: float
    open_rss_mb: float
    rows_rss_mb: float  # once the process has taken its part of the rows in an epoch's order
    rows_uss_mb: float  # of that, its own
    processes: int
    node_pss_mb: float  # summed over the processes
    first_batch_s: float
    plan: feeding.PlanCost

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples: {self.head_mb:.1f} MB head, {self.columns_mb:.1f} MB columns, "
            f"{self.node_copy_mb:.1f} MB copy of a node\n"
            f"written in {self.write_s:.2f} s, opened first in {self.first_open_s:.2f} s, then in {self.open_s:.3f} s\n"
            f"a process: {self.open_rss_mb:.1f} MB resident when open, {self.rows_rss_mb:.1f} MB after its part of the rows "
            f"({self.rows_uss_mb:.1f} MB its own)\n"
            f"{self.processes} processes: {self.node_pss_mb:.0f} MB summed PSS; first batch {self.first_batch_s:.2f} s\n"
            f"{self.plan}"
        )


def repeated(source: str, count: int) -> Manifest:
    """Make a manifest of `count` samples out of those of `source`.

    Raises:
        DataError: `source` has none.
    """
    first = read_manifest(source)
    if not first.samples:
        raise DataError(f"{source} has no samples to repeat")
    tars = [replace(s, url=shard_url(source, s)) for s in first.shards]
    numbers: dict[tuple[int, int], int] = {}  # (part of the set, shard of the source) -> shard
    samples = Builder(Sample)
    rows = list(first.samples)
    for start in range(0, count, BLOCK):
        some = [rows[n % len(rows)] for n in range(start, min(start + BLOCK, count))]
        for n, sample in enumerate(some, start=start):
            numbers.setdefault((n // SHARD_SAMPLES, sample.shard), len(numbers))
        lists = {name: [getattr(s, name) for s in some] for name in Sample.__dataclass_fields__}
        lists["shard"] = [numbers[n // SHARD_SAMPLES, s.shard] for n, s in enumerate(some, start=start)]
        lists["key"] = [
            f"class_name_{n % 400}_{n:011d}_000059_000069-{n * 0x9E3779B97F % 2**40:010x}"
            for n in range(start, start + len(some))
        ]
        lists["source_id"] = [
            f"class name {n % 400}/{n * 0x9E3779B1 % 10**11:011d}_000059_000069.mp4" for n in range(start, start + len(some))
        ]
        samples.add(block_of(Sample, lists))
    table = samples.table()
    counts = np.bincount(table.numbers("shard"), minlength=len(numbers)).tolist()
    shards = [replace(tars[of], samples=found) for (_, of), found in zip(numbers, counts, strict=True)]
    return replace(first, shards=Table.of(Shard, shards), samples=table, rejected=(), read=count)  # type: ignore[arg-type]


def _start(url: str, part: int, parts: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, url, str(part), str(parts)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _said(process: subprocess.Popen[str]) -> list[float]:
    assert process.stdout
    return [float(word) for word in process.stdout.readline().split()]


def _alone(url: str, parts: int = 0) -> list[float]:
    process = _start(url, 0, parts)
    found = _said(process)
    process.communicate()
    return found


def node_pss(url: str, processes: int) -> float:
    """Sum the PSS of `processes` that each took their part of the rows and are all alive, in MB."""
    started = []
    for part in range(processes):  # one after another, so that few cores suffice
        started.append(_start(url, part, processes))
        _said(started[-1])
    total = 0.0
    for process in started:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        total += _said(process)[0]
    for process in started:
        process.communicate()
    return total / MB


def measure(source: str, count: int, processes: int, ranks: int, folder: str) -> Costs:
    """Measure a manifest of `count` samples in `folder`, which is also the node's cache meanwhile."""
    full, empty = f"{folder}/full", f"{folder}/empty"
    write_manifest(replace(read_manifest(source), shards=(), samples=(), rejected=(), read=0), empty)  # type: ignore[arg-type]
    manifest = repeated(source, count)
    began = time.perf_counter()
    write_manifest(manifest, full)
    written = time.perf_counter() - began
    del manifest
    for _ in range(2):
        nothing = _alone(empty)
    first = _alone(full)
    copies = sum(p.stat().st_size for p in Path(folder, "cache").rglob("*.safetensors"))
    opened, taken = _alone(full), _alone(full, processes)
    data = DataSettings(train=full, workers=1, frames=8, size=64, sampling="dense")
    return Costs(
        count,
        Path(full, "manifest.json").stat().st_size / MB,
        sum(p.stat().st_size for p in Path(full).glob("*.parquet")) / MB,
        copies / MB,
        written,
        first[0],
        opened[0],
        (opened[1] - nothing[1]) / MB,
        (taken[3] - nothing[3]) / MB,
        (taken[4] - nothing[4]) / MB,
        processes,
        node_pss(full, processes) - node_pss(empty, processes),
        feeding.first_batch(data, min(8, count), 0),
        feeding.plan_cost(count, ranks),
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line: print what was measured, then the JSON."""
    parser = argparse.ArgumentParser(prog="benchmark.py manifest", description=__doc__)
    parser.add_argument("shards", help="URL of shards whose samples are repeated")
    parser.add_argument("--samples", type=int, nargs="+", default=[240_000, 1_000_000], metavar="N")
    parser.add_argument("--processes", type=int, default=72, help="of a node: 8 ranks and 8 of each (%(default)s)")
    parser.add_argument("--ranks", type=int, default=4096, help="of the plan (%(default)s)")
    args = parser.parse_args(arguments)
    results = []
    for count in args.samples:
        with tempfile.TemporaryDirectory() as folder, feeding.node_cache_at(f"{folder}/cache"):
            results.append(measure(args.shards, count, args.processes, args.ranks, folder))
        print(results[-1], end="\n\n", flush=True)
    print(
        json.dumps({"machine": f"{platform.machine()}, {os.cpu_count()} cores", "manifests": [asdict(r) for r in results]})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
