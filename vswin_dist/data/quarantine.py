"""The ledger of corrupt samples, whose videos do not decode: why, and what replaced them; and the budget of them.

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
from vswin_dist.records import parse_record

FILE = "quarantine.jsonl"
# So many corrupt samples never stop a training run: a fraction of few samples says nothing. At half the budget's rate,
# 8 in the first 800 samples of a 1% budget come by chance in 2 of 100 runs.
ALWAYS_ALLOWED = 8


@dataclass(frozen=True)
class CorruptSample:
    """A sample that did not decode at its position of a global batch, and the sample that stands there instead."""

    step: int
    position: int
    epoch: int
    sample: int
    reason: str
    substitute: int


@dataclass
class Entry:
    """A line of the file: a corrupt sample, why, its first position (`place`), and how often it was replaced."""

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
    """The corrupt samples of one training run so far.

    Args:
        url: folder where `quarantine.jsonl` is kept.
        manifest: of the samples that are counted; `base` is its URL.
    """

    def __init__(self, url: str, manifest: Manifest, base: str) -> None:
        self.url, self.manifest, self.base = storage.join(url, FILE), manifest, base
        self.entries: dict[int, Entry] = {}

    def load(self) -> None:
        """Take over what an earlier part of this training run has written.

        Raises:
            DataError: the file cannot be read as a ledger.
        """
        try:
            lines = storage.read_bytes(self.url).decode().splitlines()
        except FileNotFoundError:
            return
        found = [
            parse_record(line, f"{self.url}, line {number},", Entry, what="entry of the ledger of corrupt samples")
            for number, line in enumerate(lines, start=1)
        ]
        self.entries = {entry.sample: entry for entry in found}

    def add(self, found: Iterable[CorruptSample]) -> None:
        """Count what all ranks have met since the last call; steps repeated after a restart count once."""
        seen = {sample: entry.last_step for sample, entry in self.entries.items()}
        for corrupt in sorted(found, key=lambda c: (c.step, c.position)):
            if corrupt.step <= seen.get(corrupt.sample, -1):
                continue
            if corrupt.sample not in self.entries:
                sample = self.manifest.samples[corrupt.sample]
                url = shard_url(self.base, self.manifest.shards[sample.shard])
                self.entries[corrupt.sample] = Entry(
                    corrupt.sample,
                    sample.key,
                    url,
                    corrupt.reason,
                    corrupt.epoch,
                    corrupt.step,
                    corrupt.position,
                    self.manifest.samples.value("key", corrupt.substitute),
                    0,
                    corrupt.step,
                )
            entry = self.entries[corrupt.sample]
            entry.times, entry.last_step = entry.times + 1, corrupt.step

    @property
    def metrics(self) -> dict[str, float]:
        """The corrupt samples, and how often others replaced them."""
        return {"data/bad_videos": len(self.entries), "data/substitutes": sum(e.times for e in self.entries.values())}

    def write(self) -> None:
        """Write the ledger where it is kept; one rank calls this."""
        lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in self.entries.values()]
        storage.put_bytes(self.url, "".join(f"{line}\n" for line in lines).encode())

    def check(self, plan: Plan, steps: int, fraction: float) -> None:
        """Compare the corrupt samples with those that `steps` steps of `plan`, or those of the ledger, have read.

        Raises:
            DataError: they are more than `fraction` of them (`data.max_bad_samples`), and more than ALWAYS_ALLOWED.
        """
        steps = max(steps, *(e.last_step + 1 for e in self.entries.values()), 0)
        corrupt = len(self.entries)
        if corrupt <= ALWAYS_ALLOWED:
            return
        read = plan.videos_read(steps, enough=corrupt / fraction if fraction else math.inf)
        if corrupt > fraction * read:
            last = max(self.entries.values(), key=lambda e: e.last_step)
            raise DataError(
                f"{corrupt} of the first {read} videos do not decode, more than data.max_bad_samples={fraction:g} "
                f"allows ({ALWAYS_ALLOWED} always are). {self.url} names them; the last is {last.key!r}: {last.reason}"
            )
