"""The ledger of videos that do not decode: what they are, why, and what took their places; and the budget of them.

Every rank holds the same ledger, merged from what all of them met; one rank writes it, a line of JSON for each video.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from vswin_dist import storage
from vswin_dist.data.plan import Plan
from vswin_dist.errors import DataError
from vswin_dist.manifest import Manifest, shard_url

FILE = "quarantine.jsonl"
# So many bad videos never stop a training: a share of few samples says nothing. At half the budget's rate, 8 in the
# first 800 samples of a 1% budget come by chance in 2 of 100 trainings.
ALWAYS_ALLOWED = 8


@dataclass(frozen=True)
class Bad:
    """A sample that did not decode in its place of a global batch, and the sample that stands there instead."""

    step: int
    place: int
    epoch: int
    sample: int
    reason: str
    substitute: int


@dataclass
class Entry:
    """A bad video: where it is, why it is bad, its first place, and how many places have been filled otherwise."""

    sample: int
    key: str
    shard: str
    reason: str
    epoch: int
    step: int
    place: int
    substitute: str  # key
    times: int
    last_step: int


class Ledger:
    """The bad videos of one training so far.

    Args:
        url: folder where ``quarantine.jsonl`` is kept.
        manifest: of the samples that are counted; `base` is its URL.
    """

    def __init__(self, url: str, manifest: Manifest, base: str) -> None:
        self.url, self.manifest, self.base = storage.join(url, FILE), manifest, base
        self.entries: dict[int, Entry] = {}

    def load(self) -> None:
        """Take over what an earlier part of this training has written.

        Raises:
            DataError: the file cannot be read as a ledger.
        """
        try:
            lines = storage.read_bytes(self.url).decode().splitlines()
        except FileNotFoundError:
            return
        try:
            found = [Entry(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise DataError(f"{self.url} is no ledger of bad videos: {error}") from error
        self.entries = {entry.sample: entry for entry in found}

    def add(self, found: Iterable[Bad]) -> None:
        """Count what all ranks have met since the last call; steps done again after a restart count once."""
        seen = {number: entry.last_step for number, entry in self.entries.items()}
        for bad in sorted(found, key=lambda b: (b.step, b.place)):
            if bad.step <= seen.get(bad.sample, -1):
                continue
            if bad.sample not in self.entries:
                sample = self.manifest.samples[bad.sample]
                url = shard_url(self.base, self.manifest.shards[sample.shard])
                self.entries[bad.sample] = Entry(bad.sample, sample.key, url, bad.reason, bad.epoch, bad.step, bad.place,
                                                 self.manifest.samples[bad.substitute].key, 0, bad.step)
            entry = self.entries[bad.sample]
            entry.times, entry.last_step = entry.times + 1, bad.step

    @property
    def metrics(self) -> dict[str, float]:
        """Bad videos, and places of batches that others took."""
        return {"data/bad_videos": len(self.entries), "data/substitutes": sum(e.times for e in self.entries.values())}

    def write(self) -> None:
        """Put the ledger where it is kept; one rank calls this."""
        lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in self.entries.values()]
        storage.put_bytes(self.url, "".join(f"{line}\n" for line in lines).encode())

    def check(self, plan: Plan, steps: int, share: float) -> None:
        """Compare the bad videos with the videos that `steps` steps of `plan`, or those of the ledger, have read.

        Raises:
            DataError: they are more than `share` of them (``data.max_bad_samples``), and more than ALWAYS_ALLOWED.
        """
        steps = max(steps, *(e.last_step + 1 for e in self.entries.values()), 0)
        bad = len(self.entries)
        if bad <= ALWAYS_ALLOWED:
            return
        read = plan.videos_read(steps, enough=bad / share if share else math.inf)
        if bad > share * read:
            last = max(self.entries.values(), key=lambda e: e.last_step)
            raise DataError(
                f"{bad} of the first {read} videos do not decode, more than data.max_bad_samples={share:g} "
                f"allows ({ALWAYS_ALLOWED} always are). {self.url} names them; the last is {last.key!r}: {last.reason}")
