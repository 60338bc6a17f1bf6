"""``--dry-run``: what a preparation would do, with time and bytes extrapolated from a few of its videos."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_prep import journal
from data_prep.archive import members
from data_prep.encode import process
from data_prep.pack import tar_bytes
from data_prep.pipeline import Job
from data_prep.progress import clock
from data_prep.report_html import human_bytes
from vswin_dist import storage

PROBES = 12  # videos that are processed for the estimate


@dataclass
class Estimate:
    """What `--dry-run` prints."""

    videos: int
    missing: int
    unnamed: int
    classes: int
    done: int  # videos that an earlier run has finished
    archives: int
    probed: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0  # of one worker, for all that is left
    bytes: int = 0  # of the shards

    def lines(self, workers: int) -> list[str]:
        """The text."""
        lines = [f"{self.videos:,} videos in {self.classes:,} classes"
                 + (f", in {self.archives} archives" if self.archives else f", {self.missing:,} of them without a file")
                 + (f"; {self.unnamed:,} files without a row" if self.unnamed else "")]
        if self.done:
            lines.append(f"{self.done:,} are in finished shards already")
        if self.probed:
            verdicts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(self.verdicts.items()))
            lines.append(f"{self.probed} videos tried: {verdicts}")
            lines.append(f"about {human_bytes(self.bytes)} of shards, {clock(self.seconds / workers)} "
                         f"with {workers} workers")
        return lines


def estimate(job: Job) -> Estimate:
    """Process a few videos of `job` in this process and extrapolate. Nothing is written."""
    missing = 0 if job.listing.archives else sum(not item.url for item in job.items)
    done = sum(r.end - r.start for r in journal.read_stretches(job.out).values())
    result = Estimate(len(job.items), missing, len(job.listing.unnamed), len(job.classes), done,
                      len(job.listing.archives))
    spent, made = 0.0, 0
    started = time.monotonic()
    for name, data in _probes(job):
        outcome, _ = process(data, job.settings.encoding, name)
        result.probed += 1
        result.verdicts[outcome.verdict] = result.verdicts.get(outcome.verdict, 0) + 1
        made += tar_bytes(outcome) if outcome.kept else 0
    spent = time.monotonic() - started
    if result.probed:
        present = result.videos - missing
        result.seconds = spent / result.probed * max(0, present - done)
        result.bytes = made // result.probed * present
    return result


def _probes(job: Job) -> Iterator[tuple[str, bytes]]:
    if job.listing.archives:
        urls = job.listing.archives[-1]
        label = urls[0].rsplit("/", 1)[-1]
        left = PROBES
        for member in members(urls, lambda name: job.listing.find(f"{label}/{name}") is not None):
            if member.data:
                yield member.name, member.data
                left -= 1
            if left == 0:
                return
        return
    present = [item for item in job.items if item.url]
    for item in present[:: max(1, len(present) // PROBES)][:PROBES]:
        yield item.source_id, storage.read_bytes(item.url)
