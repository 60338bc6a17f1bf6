"""`--dry-run`: what a preparation would do, with time and bytes extrapolated from a few of its videos."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from data_prep import journal
from data_prep.archive import members
from data_prep.encode import process
from data_prep.pack import tar_bytes
from data_prep.pipeline import Preparation
from data_prep.report_html import human_bytes
from data_prep.sources.items import Item
from vswin_dist import storage

PROBES = 12  # videos that are processed for the estimate


@dataclass
class Estimate:
    """What `--dry-run` prints."""

    videos: int
    missing: int
    unlabelled: int
    classes: int
    done: int  # videos that an earlier run has finished
    archives: int
    probed: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0  # of one worker, for all that is left
    bytes: int = 0  # of the shards

    def lines(self, workers: int) -> list[str]:
        """Format the text."""
        lines = [
            f"{self.videos:,} videos in {self.classes:,} classes"
            + (f", in {self.archives} archives" if self.archives else f", {self.missing:,} of them without a file")
            + (f"; {self.unlabelled:,} files without a row" if self.unlabelled else "")
        ]
        if self.done:
            lines.append(f"{self.done:,} are in finished shards already")
        if self.probed:
            verdicts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(self.verdicts.items()))
            lines.append(f"{self.probed} videos tried: {verdicts}")
            time_needed = tqdm.format_interval(self.seconds / workers)
            lines.append(f"about {human_bytes(self.bytes)} of shards, {time_needed} with {workers} workers")
        return lines


def estimate(preparation: Preparation) -> Estimate:
    """Process a few videos of `preparation` in this process and extrapolate. Nothing is written."""
    missing = 0 if preparation.listing.archives else len(preparation.items) - len(preparation.items.present())
    done = sum(r.end - r.start for r in journal.read_ranges(preparation.out).values())
    result = Estimate(
        len(preparation.items),
        missing,
        len(preparation.listing.unlabelled),
        len(preparation.classes),
        done,
        len(preparation.listing.archives),
    )
    spent, made = 0.0, 0
    started = time.monotonic()
    for item, data in _probes(preparation):
        outcome, _ = process(data, preparation.settings.encoding, item.name, item.stretch)
        result.probed += 1
        result.verdicts[outcome.verdict] = result.verdicts.get(outcome.verdict, 0) + 1
        made += tar_bytes(outcome) if outcome.kept else 0
    spent = time.monotonic() - started
    if result.probed:
        present = result.videos - missing
        result.seconds = spent / result.probed * max(0, present - done)
        result.bytes = made // result.probed * present
    return result


def _probes(preparation: Preparation) -> Iterator[tuple[Item, bytes]]:
    if preparation.listing.archives:
        urls = preparation.listing.archives[-1]
        label = urls[0].rsplit("/", 1)[-1]
        left = PROBES
        for member in members(urls, lambda name: bool(preparation.listing.find(f"{label}/{name}"))):
            if member.data:
                yield preparation.listing.find(f"{label}/{member.name}")[0], member.data
                left -= 1
            if left == 0:
                return
        return
    present = preparation.items.present()
    for index in present[:: max(1, len(present) // PROBES)][:PROBES].tolist():
        item = preparation.items[index]
        yield item, storage.read_bytes(item.url)
