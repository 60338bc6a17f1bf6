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
from multiprocessing.connection import Connection

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vswin_dist.errors import at_least

HOST, LIMIT = "127.0.0.1", timedelta(minutes=10)
HERE, ALL_HERE = "here", "all_here"


@dataclass(frozen=True)
class Met:
    """Seconds until all ranks were connected, and until each of them was given the value."""

    connected: float
    given: float


def take_part(port: int, ranks: int, line: Connection) -> None:
    """Be `ranks` of the ranks; `line` leads to who measures."""
    line.send(time.monotonic())  # torch is imported
    line.recv()
    stores = [TCPStore(HOST, port, is_master=False, timeout=LIMIT, wait_for_workers=False) for _ in range(ranks)]
    line.send(time.monotonic())
    for store in stores:
        store.add(HERE, 1)
    for store in stores:
        store.get(ALL_HERE)
    line.send(time.monotonic())
    line.recv()  # until it is ended: a connection that closes is work for the store


def last(lines: list[Connection]) -> float:
    """Return when the last of the processes came to its next message; EOFError where one has ended instead."""
    return float(max(line.recv() for line in lines))


def meet(ranks: int, processes: int) -> Met:
    """Let `ranks` ranks meet, of which each of `processes` processes is as many.

    Raises:
        RuntimeError: a process has ended before.
    """
    context = multiprocessing.get_context("spawn")
    master = TCPStore(HOST, 0, is_master=True, timeout=LIMIT, wait_for_workers=False)
    workers, lines = [], []
    for number in range(processes):
        line, other = context.Pipe()
        share = ranks // processes + (number < ranks % processes)
        workers.append(context.Process(target=take_part, args=(master.port, share, other)))
        workers[-1].start()
        other.close()  # so that the process alone holds its end
        lines.append(line)
    try:
        last(lines)
        began = time.monotonic()
        for line in lines:
            line.send(None)
        connected = last(lines) - began
        while master.add(HERE, 0) < ranks:
            if not all(worker.is_alive() for worker in workers):
                raise EOFError
            time.sleep(0.001)
        master.set(ALL_HERE, "x" * 128)
        given = last(lines) - began
    except (EOFError, BrokenPipeError):
        raise RuntimeError("a process that makes ranks' connections has ended; what it printed stands above") from None
    finally:
        for worker in workers:
            worker.terminate()
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
