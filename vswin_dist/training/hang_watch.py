"""The process that watches one rank: where it falls silent, its stacks are kept, and it is ended for Ray to replace it.

It stands outside, since no thread of a rank runs where that is stopped or is held up in C code. Each rank has one, so that a
training's other ranks, which wait for the silent one, are seen silent too: all stacks are kept before any rank is ended.
Started by `hangs.watched`; imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vswin_dist import storage
from vswin_dist.errors import StorageError
from vswin_dist.training import heartbeat
from vswin_dist.training.heartbeat import Beat

LOOK_EVERY_S = 0.5
OTHERS_S = 10.0  # how long the reports of the other ranks are waited for, and a fifth of the limit more
SPY_S = 30.0
FAULTHANDLER_S = 5.0
NODES = "nodes.json"  # of the ranks, in their order
_STATES = {"R": "running", "S": "sleeping", "D": "in the kernel", "T": "stopped", "t": "traced", "Z": "dead", "X": "dead"}


@dataclass(frozen=True)
class Report:
    """What is known of a rank that hangs, or whose collective failed: the first line of its file."""

    rank: int
    node: str
    beat: Beat
    state: str  # of its process: R, S, D, T, ... as in /proc
    waits: bool  # in a collective, for the others
    silent_s: float = 0.0
    error: str = ""  # of the collective that failed

    @property
    def name(self) -> str:
        """Of its file."""
        return f"step-{self.beat.step}-rank-{self.rank}.txt"

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.node}, in {self.beat.phase} of step {self.beat.step}"
        if self.error:
            return f"{where}: {self.error}"
        return f"{where}: silent for {self.silent_s:.0f} s, process {_STATES.get(self.state, self.state)}"

    def write(self, folder: str, nodes: Sequence[str], stacks: str = "") -> None:
        """Put it and the `stacks` into `folder`, beside the names of all ranks' nodes."""
        storage.put_bytes(storage.join(folder, self.name), f"{json.dumps(asdict(self))}\n{self}\n\n{stacks}".encode())
        if not storage.exists(storage.join(folder, NODES)):
            storage.put_bytes(storage.join(folder, NODES), json.dumps(list(nodes)).encode())


class Silence:
    """How long nothing new was heard."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._heard, self._looked = 0, math.inf

    def look(self, beat: Beat, now: float) -> None:
        """Look again at the time `now`; time in which this process was held up as well says nothing about the rank."""
        passed = min(max(now - self._looked, 0.0), 2 * LOOK_EVERY_S)
        self.seconds = self.seconds + passed if beat.number == self._heard else 0.0
        self._heard, self._looked = beat.number, now


@dataclass(frozen=True)
class Watch:
    """What a watcher is told at its start: one line of JSON at its standard input, whose end means the rank's."""

    pid: int
    rank: int
    nodes: list[str]  # of all ranks
    folder: str  # URL where the reports of these ranks go
    heartbeat: int  # file descriptor
    faults: int  # file descriptor, to which faulthandler writes at SIGUSR2

    def run(self) -> None:
        """Watch until the rank ends, or is ended here."""
        process, memory = os.pidfd_open(self.pid), heartbeat.shared(self.heartbeat)
        ended = select.poll()
        for file in (process, 0):
            ended.register(file, select.POLLIN | select.POLLHUP)
        silence, beat = Silence(), Beat(limit_s=math.inf)
        while not ended.poll(1000 * LOOK_EVERY_S):
            beat = heartbeat.read(memory) or beat
            silence.look(beat, time.monotonic())
            if silence.seconds >= beat.limit_s:
                reporting = threading.Thread(target=self.report, args=(beat, silence.seconds), daemon=True)
                reporting.start()
                reporting.join(SPY_S + FAULTHANDLER_S + OTHERS_S + beat.limit_s / heartbeat.SLOWEST)
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                return

    def report(self, beat: Beat, silent_s: float) -> None:
        """Keep the rank's stacks, and wait until those of the others are kept."""
        state = process_state(self.pid)
        found = stacks(self.pid, self.faults)
        report = Report(self.rank, self.nodes[self.rank], beat, state, in_collective(found), silent_s)
        try:
            report.write(self.folder, self.nodes, f"{found}\n{threads(self.pid)}")
        except StorageError:  # else they are printed from there: what this process prints, Ray may lose with its rank
            print(f"{report}\n\n{found}", file=sys.stderr, flush=True)
            raise
        until = time.monotonic() + OTHERS_S + beat.limit_s / heartbeat.SLOWEST
        while len(report_names(self.folder)) < len(self.nodes) and time.monotonic() < until:
            time.sleep(LOOK_EVERY_S)


def report_names(folder: str) -> list[str]:
    """Return the names of the reports in `folder`."""
    return [name for name in storage.list_names(folder) if name.endswith(".txt")]


def process_state(pid: int) -> str:
    """Return the letter of the process's state; "" where it is gone."""
    return _stat_state(Path(f"/proc/{pid}/stat"))


def _stat_state(path: Path) -> str:
    try:
        return path.read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def threads(pid: int) -> str:
    """Say what the kernel knows of each thread: where stacks cannot be had, it is all there is."""
    rows = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            waits_in = (task / "wchan").read_text() or "0"
            rows.append(f"{task.name:>8} {_stat_state(task / 'stat')} {waits_in:24} {(task / 'comm').read_text().strip()}")
    return "\n".join(["thread, state, where in the kernel, name:", *rows])


def stacks(pid: int, faults: int) -> str:
    """Return the Python stacks of all threads: by py-spy, or where that is refused by the rank's faulthandler."""
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    refused = "py-spy is not installed"
    # It suspends what it reads, which fails with a process that is stopped; one that runs may move while it is read.
    ways: list[list[str]] = [["--nonblocking"], []] if process_state(pid) in "Tt" else [[], ["--nonblocking"]]
    for way in ways if spy else []:
        try:
            command = [str(spy), "dump", "--pid", str(pid), *way]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SPY_S / len(ways), check=True)
            return done.stdout
        except subprocess.CalledProcessError as error:
            refused = error.stderr.strip().partition("\n")[0]
        except (subprocess.TimeoutExpired, OSError) as error:
            refused = str(error)
    return faulthandler_stacks(pid, faults) or f"no stacks: {refused}, and the process does not answer a signal"


def faulthandler_stacks(pid: int, faults: int) -> str:
    """Return what the rank's faulthandler writes at SIGUSR2; a stopped process runs on for it. "" where nothing comes."""
    before, until = os.fstat(faults).st_size, time.monotonic() + FAULTHANDLER_S
    try:
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return ""
    size = before
    while time.monotonic() < until:
        time.sleep(0.2)
        grown = os.fstat(faults).st_size
        if size == grown > before:
            break
        size = grown
    return os.pread(faults, size - before, before).decode(errors="replace")


def in_collective(found: str) -> bool:
    """Say whether one of the `stacks` is in a collective."""
    return "torch/distributed/" in found or "deepspeed/comm/" in found


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # it ends with its rank
    Watch(**json.loads(sys.stdin.readline())).run()
