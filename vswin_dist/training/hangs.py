"""Hangs of a training's ranks: each rank is watched, and what was found is told: in the log, and as artifacts of the run.

The reports stand beside the checkpoints in `hang/START`, START being when the ranks were started, where every node's watcher
can write; the main rank of the next start, or the driver at the end, hands them to the tracking store.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from vswin_dist import storage
from vswin_dist.device import Rank
from vswin_dist.errors import StorageError, TrackingError
from vswin_dist.tracking import Run
from vswin_dist.training import hang_watch
from vswin_dist.training.hang_watch import NODES, Report, Watch, report_names
from vswin_dist.training.heartbeat import FIRST, Beat, Heartbeat, shared

FOLDER = "hang"
PUBLISHED = "published"  # an empty file beside reports that the tracking store has
OTHERS_S = 2.0  # how long a rank whose collective failed waits for the others' reports
LEAST_TIMEOUT_S = 1800
_ALLOW_READING = 0x59616D61  # prctl: the process that may read this one's memory, where only parents may
_log = logging.getLogger(__name__)


def collective_timeout_s(hang_s: float) -> int:
    """Return when a collective gives up by itself: after a watcher would have ended its rank."""
    return max(LEAST_TIMEOUT_S, int(2 * FIRST * hang_s))


@contextmanager
def watched(root: str, rank: Rank, hang_s: float) -> Iterator[Heartbeat]:
    """Have another process watch this rank while the block runs. Collective: the ranks tell each other their nodes.

    Args:
        root: URL of the folder of the checkpoints.
    """
    told = rank.gather((socket.gethostname(), f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"))
    nodes, folder = [node for node, _ in told], storage.join(root, FOLDER, told[0][1])
    beats, faults = os.memfd_create("heartbeat"), os.memfd_create("faults")  # without names: they go with the processes
    heartbeat = Heartbeat(hang_s, shared(beats))
    faulthandler.register(signal.SIGUSR2, file=faults)
    watch = Watch(os.getpid(), rank.rank, nodes, folder, beats, faults)
    watcher = _start(watch)
    try:
        yield heartbeat
    except Exception as error:
        if rank.world_size > 1 and is_of_collective(error):
            _report(watch, heartbeat.last, error)
        raise
    finally:
        assert watcher.stdin
        watcher.stdin.close()  # which ends it
        watcher.wait()
        faulthandler.unregister(signal.SIGUSR2)
        os.close(beats)
        os.close(faults)


def _start(watch: Watch) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    watcher = subprocess.Popen(
        [sys.executable, "-m", hang_watch.__name__],
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        pass_fds=(watch.heartbeat, watch.faults),
        start_new_session=True,  # what ends a group of processes, a rank's among them, leaves it its last words
    )
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_ALLOW_READING, watcher.pid, 0, 0, 0)
    assert watcher.stdin
    watcher.stdin.write(json.dumps(asdict(watch)) + "\n")
    watcher.stdin.flush()
    return watcher


def is_of_collective(error: Exception) -> bool:
    """Say whether a collective failed: of NCCL, or of gloo, which has no error of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _report(watch: Watch, beat: Beat, error: Exception) -> None:
    """Report the failed collective, and note in `error` who did not answer: who has not reported the same soon after."""
    cause = f"a collective failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    report = Report(watch.rank, watch.nodes[watch.rank], beat, "R", waits=True, error=cause)
    with contextlib.suppress(StorageError):
        if report.name not in report_names(watch.folder):  # else it was found silent before, and its stacks are there
            report.write(watch.folder, watch.nodes, str(error))
        until = time.monotonic() + OTHERS_S
        while len(report_names(watch.folder)) < len(watch.nodes) and time.monotonic() < until:
            time.sleep(0.2)
        if hang := read(watch.folder):
            error.add_note(str(hang))
            print(hang, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Hang:
    """The reports of the ranks that were started together."""

    folder: str
    nodes: Sequence[str]
    reports: Sequence[Report]

    @property
    def silent(self) -> list[int]:
        """The ranks that did not answer, where it can be told: without a report, stopped, behind, or not in a collective."""
        if absent := set(range(len(self.nodes))) - {r.rank for r in self.reports}:
            return sorted(absent)
        behind = min(r.beat.number for r in self.reports)
        for found in (
            [r for r in self.reports if r.state in "TtZX"],
            [r for r in self.reports if r.beat.number == behind],
            [r for r in self.reports if not r.waits],
        ):
            if 0 < len(found) < len(self.nodes):
                return sorted(r.rank for r in found)
        return sorted(r.rank for r in self.reports) if len(self.nodes) == 1 else []

    def __str__(self) -> str:
        known = {r.rank: str(r) for r in self.reports}
        step = max(r.beat.step for r in self.reports)
        who = [known.get(rank, f"rank {rank} on {self.nodes[rank]}: no word from it") for rank in self.silent]
        return (
            f"the ranks hung or failed in step {step}; "
            + (f"did not answer: {'; '.join(who)}" if who else "every rank waits for the others: look at the network")
            + f". Stacks of {len(self.reports)} of {len(self.nodes)} ranks: {self.folder}"
        )


def read(folder: str) -> Hang | None:
    """Read the reports in `folder`; None where there is none yet."""
    names = report_names(folder)
    if not names or not storage.exists(storage.join(folder, NODES)):
        return None
    heads = [json.loads(storage.read_bytes(storage.join(folder, name)).partition(b"\n")[0]) for name in names]
    reports = [Report(**head | {"beat": Beat(**head["beat"])}) for head in heads]
    return Hang(folder, json.loads(storage.read_bytes(storage.join(folder, NODES))), reports)


def publish(root: str, tracking: Run) -> None:
    """Print what is known of each hang below `root` that is not published yet; its reports become artifacts."""
    try:
        for start in storage.list_names(storage.join(root, FOLDER)):
            folder = storage.join(root, FOLDER, start)
            if storage.exists(storage.join(folder, PUBLISHED)) or not (hang := read(folder)):
                continue
            print(hang, flush=True)

            def keep(name: str, start: str = start, folder: str = folder) -> str:
                text = storage.read_bytes(storage.join(folder, name)).decode()
                tracking.artifact(f"{FOLDER}/{start}/{name}", text)
                return text

            with ThreadPoolExecutor(8) as pool:
                for text in pool.map(keep, report_names(folder)):
                    print(text.partition("\n")[2], flush=True)
            storage.put_bytes(storage.join(folder, PUBLISHED), b"")
    except (StorageError, TrackingError) as error:
        _log.warning("the stacks of ranks that hung are not in the tracking store: %s", error)


@contextmanager
def published(root: str, tracking: Run) -> Iterator[None]:
    """Publish what the block leaves to be; not where the storage that holds it is away."""
    try:
        yield
    except StorageError:
        raise
    except BaseException:
        publish(root, tracking)
        raise
    publish(root, tracking)
