"""What a cluster on this machine consists of, in one JSON file: enough to end all of it, also after its launcher died.

A process is known by its id and the time of its start, so that no other one that got the id later is taken for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vswin_dist.errors import DataError, WorkFailed
from vswin_dist.local_files import write_atomically

MARK = "VSWIN_LOCAL_CLUSTER"  # names the cluster's folder in the environment of all its processes
FILE = "cluster.json"
END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Host:
    """One host: its name, its place in the network, and the processors that Ray gives to ranks."""

    name: str
    number: int  # within the cluster, from 1
    address: str
    cpus: int
    ports: dict[str, int]  # of Ray, by what listens there
    rate_mbit: float | None = None  # of its link, where it is slowed
    round_trip_ms: float | None = None  # added to its link, where it is worsened
    loss: float | None = None  # fraction of the frames that its link loses


@dataclass
class Record:
    """A cluster's hosts and processes; what changes it saves it at once."""

    folder: Path
    number: int | None = None  # of its bridge and its network 10.77.NUMBER.0/24; None: plain processes
    hosts: dict[str, Host] = field(default_factory=dict)
    processes: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> id, ticks at its start
    services: dict[str, str] = field(default_factory=dict)  # name -> where it listens

    def save(self) -> None:
        """Write the file."""
        values = {**asdict(self), "folder": str(self.folder)}
        with write_atomically(self.folder / FILE, durable=False) as path:
            path.write_text(json.dumps(values, indent=1) + "\n")

    def set_host(self, host: Host, **changes: Any) -> Host:
        """Keep `host`, with some of its fields changed; returns it."""
        changed = replace(host, **changes)
        self.hosts[host.name] = changed
        self.save()
        return changed

    def host(self, name: str) -> Host:
        """Return the host of a name.

        Raises:
            DataError: there is none.
        """
        if name not in self.hosts:
            raise DataError(f"there is no host {name!r}; there are {', '.join(self.hosts)}")
        return self.hosts[name]

    @property
    def head(self) -> Host:
        """The host of Ray's head."""
        return next(iter(self.hosts.values()))

    def launch(self, name: str, command: list[str], env: dict[str, str], user: str | None = None) -> int:
        """Start a process in a session of its own, its output in log/NAME.log, and record it; returns its id."""
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log" / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                command,
                env={**env, MARK: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
                start_new_session=True,
                user=user,
                group=user and _group(user),
                extra_groups=[] if user else None,
            )
        self.processes[name] = (process.pid, started(process.pid) or 0)
        self.save()
        process.returncode = 0  # it outlives this process, and is ended by its id
        return process.pid

    def runs(self, name: str) -> bool:
        """Return True where the recorded process runs."""
        pid, ticks = self.processes.get(name, (0, 0))
        return bool(pid) and started(pid) == ticks

    def end(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal a recorded process, and see to it that it ends; another that has its id by now is let be."""
        if self.runs(name):
            pid = self.processes[name][0]
            os.kill(pid, number)
            if not wait_until(lambda: not self.runs(name), END_TIMEOUT_S):
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not self.runs(name), END_TIMEOUT_S)
        self.processes.pop(name, None)
        self.save()

    def log_end(self, name: str, characters: int = 2000) -> str:
        """Return the end of a process's log."""
        path = self.folder / "log" / f"{name}.log"
        return path.read_text(errors="replace")[-characters:] if path.exists() else ""

    def wait_for(self, name: str, what: Callable[[], bool], timeout_s: float) -> None:
        """Wait until a recorded process does what it is there for.

        Raises:
            WorkFailed: it ended, or the time is over; holds the end of its log.
        """
        if not wait_until(lambda: what() or not self.runs(name), timeout_s) or not self.runs(name):
            state = "does not answer" if self.runs(name) else "ended"
            raise WorkFailed(f"{name} {state}; {self.folder}/log/{name}.log ends:\n{self.log_end(name)}")


def read(folder: Path) -> Record:
    """Read the record of the cluster in `folder`.

    Raises:
        DataError: there is none.
    """
    try:
        values = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        raise DataError(f"there is no cluster in {folder}: start one by `make cluster`") from None
    hosts = {name: Host(**host) for name, host in values["hosts"].items()}
    processes = {name: (pid, ticks) for name, (pid, ticks) in values["processes"].items()}
    return Record(folder, values["number"], hosts, processes, values["services"])


def started(pid: int) -> int | None:
    """Return when a process started, in ticks since the machine's start; None where it has ended."""
    with contextlib.suppress(OSError, ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # where it was this process's child
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    return None


def marked(folder: Path) -> Iterator[int]:
    """Yield the ids of all processes that bear the mark of the cluster in `folder`."""
    wanted = f"{MARK}={folder}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (place / "environ").read_bytes().split(b"\0") and int(place.name) != os.getpid():
                yield int(place.name)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until `condition` holds; False where it has not within `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _group(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid
