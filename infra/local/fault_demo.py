"""`make fault-demo`: a training on two hosts of this machine, while what is between them fails: links, and the head's host.

The same training each time, submitted from outside with `ray job submit`; its losses must be those of the one that nothing
disturbs. Where the head is lost, whoever submitted gives the same command again.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.local import hosts, network
from infra.local.record import Host, Record
from infra.local.trials import TRAIN, Disturbance, Trial, compare, ending, fill_bucket, losses, prepare
from vswin_dist.errors import WorkFailed, run_command

CUT_S = 10.0
BAD_S, ROUND_TRIP_MS, LOSS = 40.0, 200.0, 0.05  # how long a link is bad, and how
HEAD_IS_AWAY_S = 5.0


@dataclass(frozen=True)
class Fault:
    """What is done to a host in the middle of a training, and whether the command must be given again."""

    name: str
    act: Callable[[Record, Host], object]
    on_head: bool = False


def later(seconds: float, act: Callable[[Record, Host], object], record: Record, host: Host) -> None:
    """Do something to a host after a time, while the training goes on."""
    timer = threading.Timer(seconds, act, (record, host))
    timer.daemon = True
    timer.start()


def cut(record: Record, host: Host) -> None:
    """Cut the link of a host."""
    network.set_link(record, host, is_up=False)


def cut_for_a_while(record: Record, host: Host) -> None:
    """Cut the link of a host, and mend it before Ray calls the host dead."""
    cut(record, host)
    later(CUT_S, network.mend, record, host)


def worsen_for_a_while(record: Record, host: Host) -> None:
    """Let the link of a host delay and lose frames, and mend it."""
    network.worsen(record, host, ROUND_TRIP_MS, LOSS)
    later(BAD_S, network.mend, record, host)


def restart(record: Record, host: Host) -> None:
    """End a host as if its power were cut, and switch it on again."""
    hosts.crash(record, host)
    time.sleep(HEAD_IS_AWAY_S)
    hosts.start_ray(record, host)


FAULTS = (
    Fault(f"a link cut for {CUT_S:g} s", cut_for_a_while),
    Fault(f"a link with {ROUND_TRIP_MS:g} ms and {LOSS:.0%} loss for {BAD_S:g} s", worsen_for_a_while),
    Fault("a link cut for good", cut),
    Fault("the head's host switched off and on", restart, on_head=True),
)


def train(trial: Trial, name: str, disturbance: Callable[[str], None] = lambda line: None) -> str:
    """Train to the end; returns what the training printed."""
    return trial.submit(*TRAIN, "training.workers=2", f"run.name={name}", meanwhile=disturbance)


def disturbed(trial: Trial, fault: Fault, name: str) -> tuple[Disturbance, str]:
    """Train while `fault` happens; where the job is lost with the head, give the command again once all hosts are back."""
    disturbance = Disturbance(trial.record, fault.act, fault.on_head)
    try:
        return disturbance, train(trial, name, disturbance)
    except WorkFailed:
        if not (fault.on_head and disturbance.host):
            raise
        hosts.wait_for_hosts(trial.record, set(trial.record.hosts))
        return disturbance, train(trial, name, disturbance)


def suffer(trial: Trial, fault: Fault, number: int, expected: dict[int, float]) -> None:
    """Take one fault, and compare the losses with the `expected`.

    Raises:
        WorkFailed: the training did not end, or learned something else.
    """
    record = trial.record
    with trial.step(fault.name) as found:
        disturbance, output = disturbed(trial, fault, f"fault-{number}")
        disturbance.check()
        apart = compare(expected, losses(trial, output))
        resumed = re.findall(r"resumed from \S*step-0*(\d+)", output)
        found.append(f"{disturbance.host}, at step {disturbance.reached}")
        found.append(f"resumed from step {resumed[-1]}" if resumed else "no rank was lost")
        found.append(f"next step shown after {disturbance.stood_still_s or 0:.0f} s")
        found.append(f"losses apart by {apart:.1e} at most")
    host = record.hosts[disturbance.host]
    if network.is_cut(record, host) or host.round_trip_ms is not None:
        network.mend(record, host)
    hosts.wait_for_hosts(record, set(record.hosts))


def run(folder: Path, chosen: list[int]) -> int:
    """Start a cluster, train undisturbed and with each fault, end the cluster, and print the table."""
    began = time.monotonic()
    record = hosts.up(folder, 3, 1)
    trial = Trial(record)
    trial.rows.append(("start the cluster", f"{time.monotonic() - began:.0f}", f"{len(record.hosts)} hosts and 3 services"))
    with ending(trial, began):
        try:
            if record.number is None:
                raise WorkFailed("plain processes have no links: this needs root and network namespaces")
            fill_bucket(trial)
            prepare(trial)
            with trial.step("undisturbed") as found:
                expected = losses(trial, train(trial, "undisturbed"))
                found.append(f"{len(expected)} steps")
            for number in chosen:
                suffer(trial, FAULTS[number - 1], number, expected)
        except BaseException:
            print(f"{hosts.table(trial.rows)}\n{hosts.status(record)}", file=sys.stderr, flush=True)
            raise
    return 0


def main() -> int:
    listed = "; ".join(f"{number}: {fault.name}" for number, fault in enumerate(FAULTS, start=1))
    parser = argparse.ArgumentParser(description=__doc__, epilog=listed)
    parser.add_argument("--folder", type=Path, default=Path(f"{hosts.FOLDER}-faults"), help="of its cluster (%(default)s)")
    numbers = range(1, len(FAULTS) + 1)
    parser.add_argument("--only", type=int, nargs="+", choices=numbers, default=list(numbers), help="of those below (all)")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hosts.stop)
    return run(args.folder.absolute(), args.only)


if __name__ == "__main__":
    sys.exit(run_command(main))
