"""One process at a time does a work that others may be told to do too: a lease in storage, with a number that fences.

A lease is a folder of small files, `00000007.json`: who claimed the work as the 7th, and how often it has renewed that.
The highest number holds. Claiming is creating the next file, which storage lets only one do
(`vswin_dist/storage.py::create_bytes`); nobody writes into the file of another, so that no more than this is asked of an
object store. Where a store does not even know that (`creates_once`), a claim is read back after `SETTLE_S`: of two who claim
at once the last to write holds, the other ends when it looks, at the latest `RENEW_S` later.

Whether a holder lives is seen by its renewals, never by comparing clocks: who wants its work looks on for `LEASE_S`. On
the holder's own machine its process is looked for instead, and nobody waits. A claim that has not been renewed for `STALE_S`
by the clocks of both, which no two clocks are apart, is dead at a look.

A holder can be cut off, or stopped, and come back after another has claimed its work. So whatever it does that lasts, it
does after `Fence.check`, under names with its number where it can.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from vswin_dist import storage
from vswin_dist.errors import FencedOut, PreflightError, StorageError, before_start, heed_interrupts
from vswin_dist.records import read_record

FOLDER = "lease"  # its name beside what it guards
LEASE_S = 30.0  # without a renewal, after which a holder counts as dead
RENEW_S = 10.0  # from one renewal to the next
LOOK_S = 0.5  # from one look at another's renewals to the next
SETTLE_S = 2.0  # before a claim is read back, where storage overwrites
STALE_S = 600.0
FORMAT, VERSION = "vswin-lease", 1
_FILE = re.compile(r"(\d{8})\.json")
_mine: set[str] = set()  # ids of the claims that this process holds


@dataclass(frozen=True)
class Claim:
    """Who claimed a work, since when, and whether it still does."""

    host: str
    machine: str  # what process ids are unique in; "" where that is not known
    pid: int
    started: int  # of the process, in ticks of its machine
    user: str
    job: str  # of Ray or Slurm; "" where it is none
    since: float  # seconds since 1970
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    renewed: float = 0.0  # when, in seconds since 1970
    renewals: int = 0
    released: bool = False

    @classmethod
    def of_this_process(cls) -> Claim:
        """Describe this process."""
        now, pid = time.time(), os.getpid()
        return cls(platform.node(), _machine(), pid, _started(pid), _user(), _job(), now, renewed=now)

    def __str__(self) -> str:
        job = f", {self.job}" if self.job else ""
        return f"pid {self.pid} on {self.host} (user {self.user}{job}) since {_utc(self.since)}"

    @property
    def is_here(self) -> bool:
        """Whether its process is one of this machine."""
        return bool(self.machine) and self.machine == _machine()

    @property
    def runs_here(self) -> bool:
        """Whether its process runs on this machine, be it stopped."""
        alive = self.is_here and _started(self.pid) == self.started
        return alive and (self.pid != os.getpid() or self.id in _mine)

    @property
    def seems_alive(self) -> bool:
        """Whether its process holds the lease, as a look tells: of another machine by the clocks of both."""
        return not self.released and (self.runs_here if self.is_here else time.time() - self.renewed < 2 * LEASE_S)


@dataclass(frozen=True)
class Fence:
    """The number under which a process does its work; plain values, for the processes that work for it."""

    url: str  # of the lease's folder; "" where nothing is fenced
    number: int = 0
    id: str = ""

    def check(self) -> None:
        """Refuse to go on where the work was claimed by another since.

        Raises:
            FencedOut: says by whom. StorageError: the lease cannot be read.
        """
        if not self.url:
            return
        newest, claim = _newest(self.url)
        if newest != self.number or claim is None or claim.id != self.id:
            by = f"by {claim}" if claim else "or its lease was removed"
            raise FencedOut(f"this work was taken over {by}: this process, number {self.number}, changes nothing any more")


UNFENCED = Fence("")


def holder(url: str) -> tuple[int, Claim | None]:
    """Look at the lease in the folder `url`: its number, and who claimed it last; 0 and None where nobody did."""
    return _newest(url)


@contextmanager
def held(url: str, what: str, remedy: str, take_over: bool = False) -> Iterator[Fence]:
    """Hold the lease in the folder `url` for the time of the block, which runs in the main thread.

    Where another claims it meanwhile, the block is interrupted as by Ctrl-C.

    Args:
        what: the work, at the beginning of a sentence, as "the training run 'x'".
        remedy: what to do where another holds it.
        take_over: claim it, whoever holds it.

    Raises:
        PreflightError: another holds it; says who. FencedOut: another has claimed it during the block.
    """
    with before_start():
        number, claim = _claim(url, what, remedy, take_over)
    renewal = _Renewal(Fence(url, number, claim.id), claim)
    try:
        with renewal.going_on():
            yield renewal.fence
    except BaseException as error:
        if renewal.lost and not isinstance(error, FencedOut):
            raise renewal.lost from error
        raise


def _claim(url: str, what: str, remedy: str, take_over: bool) -> tuple[int, Claim]:
    while True:
        number, other = _newest(url)
        if other and not other.released:
            if take_over:
                _say(f"{what} is taken over from {other}")
            else:
                _await_end(url, number, other, what, remedy)
                if _newest(url)[0] != number:
                    continue
        mine = Claim.of_this_process()
        _mine.add(mine.id)
        if _create(_file(url, number + 1), mine) and _newest(url) == (number + 1, mine):
            break
        _mine.discard(mine.id)
        take_over = False  # whoever was faster holds it rightly
    for name in storage.list_names(url):
        if (match := _FILE.fullmatch(name)) and int(match[1]) < number:  # the last one is left for people to read
            storage.remove(storage.join(url, name))
    return number + 1, mine


def _await_end(url: str, number: int, other: Claim, what: str, remedy: str) -> None:
    """Return once `other` is known to be dead, or has released the lease.

    Raises:
        PreflightError: it lives.
    """
    if other.is_here:
        if other.runs_here:
            raise _refusal(other, what, remedy)
        _say(f"{what} was left by {other}, which runs no more; going on")
        return
    if time.time() - other.renewed > STALE_S:
        _say(f"{what} was left by {other}, last seen {_utc(other.renewed)}; going on")
        return
    _say(f"{what} is held by {other}; waiting up to {LEASE_S:g} s to see whether it lives")
    end = time.monotonic() + LEASE_S
    while time.monotonic() < end:
        time.sleep(LOOK_S)
        newest, claim = _newest(url)
        if newest != number or claim is None or claim.released:
            return
        if claim.renewals != other.renewals:
            raise _refusal(claim, what, remedy)


def _refusal(other: Claim, what: str, remedy: str) -> PreflightError:
    return PreflightError(f"{what} is held by {other}, last seen {_utc(other.renewed)}: {remedy}")


def _create(url: str, claim: Claim) -> bool:
    data = _bytes(claim)
    if not storage.create_bytes(url, data):
        return False
    if storage.creates_once(url, data):
        return True
    time.sleep(SETTLE_S)
    return storage.read_bytes(url) == data


class _Renewal:
    """Renews a claim in a thread, and interrupts the main one where it is lost."""

    def __init__(self, fence: Fence, claim: Claim) -> None:
        self.fence, self.claim = fence, claim
        self.lost: FencedOut | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Renew it for the time of the block, and release it at its end."""
        heed_interrupts()
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()
            _mine.discard(self.claim.id)
            if self.lost is None:
                with suppress(StorageError, FencedOut):  # it ends by itself then
                    self._write(released=True)
        if self.lost:
            raise self.lost

    def _work(self) -> None:
        while not self._over.wait(RENEW_S):
            try:
                self._write()
            except StorageError:  # away: nobody else can claim it there either, or the fence will say so
                continue
            except FencedOut as error:
                self.lost = error
                _say(str(error))
                os.kill(os.getpid(), signal.SIGINT)
                return

    def _write(self, released: bool = False) -> None:
        self.fence.check()
        now = time.time()
        self.claim = replace(self.claim, renewed=now, renewals=self.claim.renewals + 1, released=released)
        storage.put_bytes(_file(self.fence.url, self.fence.number), _bytes(self.claim))


def _newest(url: str) -> tuple[int, Claim | None]:
    """Find the highest number, and its claim; 0 and None where there is none."""
    numbers = [int(match[1]) for name in storage.list_names(url) if (match := _FILE.fullmatch(name))]
    if not numbers:
        return 0, None
    place = _file(url, max(numbers))
    try:
        return max(numbers), read_record(place, Claim, format=FORMAT, version=VERSION, what="lease", error=PreflightError)
    except FileNotFoundError:  # between the listing and now
        return max(numbers), None


def _file(url: str, number: int) -> str:
    return storage.join(url, f"{number:08d}.json")


def _bytes(claim: Claim) -> bytes:
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(claim)}, indent=1).encode()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _machine() -> str:
    """Name what process ids are unique in: a boot of a machine, and a namespace of processes on it."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> int:
    """When the process `pid` of this machine was started, in ticks; 0 where there is none, or a dead one."""
    with suppress(OSError, ValueError, IndexError):
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "ZX" else int(values[18])
    return 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user id without a name
        return str(os.getuid())


def _job() -> str:
    """Name the job that this process is, of Ray or of Slurm."""
    if number := os.environ.get("SLURM_JOB_ID"):
        return f"Slurm job {number}"
    with suppress(ValueError, KeyError, TypeError):
        return f"Ray job {json.loads(os.environ['RAY_JOB_CONFIG_JSON_ENV_VAR'])['metadata']['job_submission_id']}"
    return ""
