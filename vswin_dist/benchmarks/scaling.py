"""Weak scaling on a Ray cluster: what 1, 2, ... ranks read and train in a second, each with the same load.

`ray job submit --working-dir . -- python jobs/benchmark.py scaling --recipe RECIPE --ranks 1 2 3 data.train=URL
storage.root=URL key=value ...`; every rank takes one micro-batch a step. Reading: the ranks' loaders give batches that
nobody computes with; the slowest rank's time counts. Training: `jobs/train.py` without a tracker and a validation. With
`--videos URL`, a folder with an index.csv of `path` and `label`, as many workers of data_prep shard them, all of them for
each number.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from statistics import median
from typing import Any

from vswin_dist import cluster, storage
from vswin_dist.config import Settings, load_settings
from vswin_dist.data.loader import TrainLoader
from vswin_dist.data.plan import make_plan
from vswin_dist.errors import at_least
from vswin_dist.manifest import read_manifest
from vswin_dist.training.run_record import runs_root

JOBS = Path(__file__).parents[2] / "jobs"
FIRST = 5  # steps of a loader that are not counted: its processes start, and read ahead
TRAINED = re.compile(r"([\d.]+) clips/s")
PREPARED = re.compile(r"([\d.]+)/s, [\d,]+ rejected")


def read(config: dict[str, Any]) -> None:
    """Read batches on one rank, and report clips a second of all ranks; what Ray Train runs on each."""
    settings, steps, rank = config["settings"], config["steps"], cluster.this_rank()
    storage.use_s3_endpoint(settings.storage.s3_endpoint)
    manifest, batch = read_manifest(settings.data.train), settings.training.global_batch
    plan = make_plan(manifest, settings.data, settings.run.seed, batch)
    loader = TrainLoader(manifest, settings.data, plan, rank, batch // rank.world_size, last=FIRST + steps)
    batches = iter(loader)
    for _ in range(FIRST):
        next(batches)
    rank.barrier()
    began = time.perf_counter()
    for _ in batches:
        pass
    slowest = max(rank.gather(time.perf_counter() - began))
    cluster.report({"rate": steps * batch / slowest}, "read" if rank.is_main else None)


def reading(settings: Settings, steps: int) -> float:
    """Return the clips that all ranks of `settings` read in a second."""
    t = settings.training
    resources = cluster.Resources((t.workers,), t.use_gpu, t.cpus_per_worker, max_failures=0)
    cluster.check_resources(resources, "--ranks")
    place = storage.join(runs_root(settings), f"{settings.run.name}-reading")
    try:
        found = cluster.run_ranks(read, {"settings": settings, "steps": steps}, resources, "scaling", place)
    finally:
        storage.remove(place, recursive=True)
    return float(found["rate"])


def training(settings: Settings, given: list[str]) -> float:
    """Return the clips that a training reads and trains in a second: the median of its log, but for the first line."""
    try:
        return median(_rates(TRAINED, [str(JOBS / "train.py"), "--recipe", settings.recipe, *given])[1:])
    finally:
        storage.remove(storage.join(runs_root(settings), settings.run.name), recursive=True)


def preparing(videos: str, target: str, workers: int) -> float:
    """Return the videos that `workers` workers of data_prep shard in a second."""
    source = ["csv", "--index", f"{videos}/index.csv", "--videos", videos]
    try:
        return _rates(PREPARED, [str(JOBS / "prepare.py"), *source, "--out", target, "--workers", str(workers)])[-1]
    finally:
        storage.remove(target, recursive=True)


def _rates(pattern: re.Pattern[str], command: list[str]) -> list[float]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    return [float(rate) for rate in pattern.findall(done.stdout + done.stderr)]


def weak(args: argparse.Namespace, ranks: int) -> list[float]:
    """Return what `ranks` ranks read, what they train, and what as many workers prepare in a second."""
    given = [*args.settings, f"run.name=scaling-{uuid.uuid4().hex[:8]}", "data.val=null", "tracking.uri=none"]
    each = load_settings(args.recipe, given).training.micro_batch
    given += [f"training.workers={ranks}", f"training.global_batch={ranks * each}", f"training.max_steps={args.steps}"]
    settings = load_settings(args.recipe, given)
    with cluster.joined():
        found = [reading(settings, args.steps)]
    found.append(training(settings, given))
    if args.videos:
        target = storage.join(runs_root(settings), f"{settings.run.name}-shards")
        found.append(preparing(args.videos, target, ranks))
    return found


def main(argv: list[str]) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="jobs/benchmark.py scaling", description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks, the first to compare with")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--videos", metavar="URL", help="for data_prep")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    at_least(20, steps=args.steps)  # a training logs every tenth
    print("| ranks | reading, clips/s | training, clips/s | data_prep, videos/s |\n|---|---|---|---|", flush=True)
    first: list[float] = []
    for ranks in args.ranks:
        found = weak(args, ranks)
        first = first or [rate / ranks for rate in found]
        cells = [f"{rate:.1f} ({rate / ranks / alone:.0%})" for rate, alone in zip(found, first, strict=True)]
        print(f"| {ranks} | {' | '.join(cells)} |{'' if args.videos else '  |'}", flush=True)
