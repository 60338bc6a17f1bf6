"""How long thousands of ranks take to meet at one store, as `torch.distributed` has them do it before anything else.

`python jobs/benchmark.py rendezvous --ranks 4096`: rank 0's store is real; the others' connections are made by a few
processes, which take their ranks one after the other. Each rank connects, counts itself in, and is given what rank 0 sets
once all are there, as the name of a communicator is. Networks and the ranks' own start are not in it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vswin_dist.errors import at_least

HOST, LIMIT = "127.0.0.1", timedelta(minutes=10)
HERE, ALL_HERE = "here", "all_here"


@dataclass(frozen=True)
class Met:
    """Seconds until all ranks were connected, and until each of them was given the value."""

    connected: float
    given: float


def take_part(port: int, ranks: int, start: Any, found: Any, told: Any) -> None:
    """Be `ranks` of the ranks."""
    start.wait()
    stores = [TCPStore(HOST, port, is_master=False, timeout=LIMIT, wait_for_workers=False) for _ in range(ranks)]
    found.put(time.monotonic())
    for store in stores:
        store.add(HERE, 1)
    for store in stores:
        store.get(ALL_HERE)
    found.put(time.monotonic())
    told.wait()  # a connection that ends is work for the store


def meet(ranks: int, processes: int) -> Met:
    """Let `ranks` ranks meet, of which each of `processes` processes is as many."""
    context = multiprocessing.get_context("spawn")
    start, found, told = context.Barrier(processes + 1), context.Queue(), context.Event()
    master = TCPStore(HOST, 0, is_master=True, timeout=LIMIT, wait_for_workers=False)
    shares = [ranks // processes + (number < ranks % processes) for number in range(processes)]
    workers = [context.Process(target=take_part, args=(master.port, share, start, found, told)) for share in shares]
    for worker in workers:
        worker.start()
    start.wait()  # they have imported torch
    began = time.monotonic()
    connected = max(found.get() for _ in workers) - began
    while master.add(HERE, 0) < ranks:
        time.sleep(0.001)
    master.set(ALL_HERE, "x" * 128)
    given = max(found.get() for _ in workers) - began
    told.set()
    for worker in workers:
        worker.join()
    return Met(connected, given)


def main(argv: list[str]) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="jobs/benchmark.py rendezvous", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--processes", type=int, default=8, help="that make the ranks' connections (%(default)s)")
    args = parser.parse_args(argv)
    at_least(1, processes=args.processes)
    print("| ranks | all connected, s | all given the value, s |\n|---|---|---|", flush=True)
    for ranks in args.ranks:
        met = meet(ranks, args.processes)
        print(f"| {ranks:,} | {met.connected:.2f} | {met.given:.2f} |", flush=True)
