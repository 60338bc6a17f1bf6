"""What a tracking store has not taken yet: files beside the checkpoints of the run, until it takes them.

    spool/0002-...-metrics-....json   number of the submission, time, kind

Records are added and removed, never changed. Each is written when it is clear that the store is away, and what must be there
is decided by what would be lost without it:

- **metrics** are written before a checkpoint is committed (`Run.keep`), and at the end: all those that the store has not
  confirmed. A run that dies goes on from its last checkpoint and logs the steps after it again, the same values; those up to
  it are logged by nobody again. Between checkpoints metrics wait in memory, and nothing is written; only where more wait
  than memory is meant for, they are written earlier.
- **start**, **artifact**, **register**, **end** are known once, by the driver: each is written as soon as the store did not
  take it. An end is that of one submission: the next one, which sets the run to RUNNING, drops it.

They are sent by the rank that logs, once its store answers; by the driver, when it starts and at its end; and by
`python -m vswin_dist.tracking sync`. A record is removed when the store has it, so that it may be sent twice: whoever sends
asks the store first what it has.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vswin_dist import storage
from vswin_dist.errors import TrackingError
from vswin_dist.lease import Fence
from vswin_dist.records import read_record

FOLDER = "spool"  # its name beside the checkpoints
FORMAT, VERSION = "vswin-spool", 1
Kind = Literal["start", "metrics", "artifact", "register", "end"]
WORDS: dict[Kind, str] = {  # in the order in which they are sent
    "start": "settings and lineage",
    "metrics": "metrics",
    "artifact": "files",
    "register": "the registration of the model",
    "end": "the end state",
}


@dataclass(frozen=True)
class Entry:
    """A record of a spool. It holds no credentials."""

    uri: str  # of the store, without user and password
    run_id: str
    kind: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Spool:
    """The spool of one run, for a process that holds `fence`."""

    url: str
    uri: str  # of the store, without user and password
    run_id: str
    fence: Fence

    def put(self, kind: Kind, body: dict[str, Any]) -> None:
        """Keep `body` until the store takes it.

        Raises:
            FencedOut: another submission has taken over. StorageError: the storage is away, too.
        """
        self.fence.check()
        name = f"{self.fence.number:04d}-{time.time_ns():020d}-{kind}-{uuid.uuid4().hex[:8]}.json"
        entry = {"format": FORMAT, "version": VERSION, **asdict(Entry(self.uri, self.run_id, kind, body))}
        storage.put_bytes(storage.join(self.url, name), json.dumps(entry).encode())

    def names(self, kind: Kind) -> list[str]:
        """Name the records of `kind` that wait, the oldest first."""
        return [name for name in storage.list_names(self.url) if f"-{kind}-" in name]

    def entries(self, kind: Kind) -> Iterator[tuple[str, dict[str, Any]]]:
        """Read the records of `kind` that wait, the oldest first: their names and bodies.

        Raises:
            TrackingError: one is damaged.
        """
        for name in self.names(kind):
            yield name, read_entry(storage.join(self.url, name)).body

    def remove(self, name: str) -> None:
        """Remove a record that the store has."""
        storage.remove(storage.join(self.url, name))

    def waiting(self) -> str:
        """Say what waits; `""` where nothing does."""
        names = storage.list_names(self.url)
        return ", ".join(words for kind, words in WORDS.items() if any(f"-{kind}-" in name for name in names))


def read_entry(url: str) -> Entry:
    """Read the record at `url`.

    Raises:
        TrackingError: it is damaged. FileNotFoundError: it was sent meanwhile.
    """
    what = "record of what MLflow has not got; remove it to go on without it"
    return read_record(url, Entry, format=FORMAT, version=VERSION, what=what, error=TrackingError)
