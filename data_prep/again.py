"""Process chosen videos of a finished dataset once more: what `retry` and `verify --repair` are made of."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_prep import journal, sources
from data_prep.archive import members
from data_prep.encode import Outcome
from data_prep.executor import Executor, LocalExecutor
from data_prep.feed import Handed, order_key
from data_prep.pack import Entry, cut_into_shards, shard_name, write_shard
from data_prep.pipeline import sample_key
from data_prep.progress import Progress
from data_prep.settings import Settings, settings_of
from data_prep.tasks import SampleTask, process_sample
from data_prep.verify import verify_dataset
from vswin_dist import storage
from vswin_dist.errors import DataError, WorkFailed
from vswin_dist.manifest import Manifest, Reject, read_manifest, write_manifest


@dataclass
class Finished:
    """A dataset that stands, with what its journal says about where it came from."""

    url: str
    manifest: Manifest
    source: sources.Source
    settings: Settings
    workers: int
    show_progress: bool

    def staging(self, purpose: str) -> str:
        """Where its videos wait, apart for every state of the dataset: an interrupted call goes on."""
        return storage.join(journal.folder(self.url), f"{purpose}-{self.manifest.fingerprint[:12]}")


def open_finished(url: str, workers: int | None = None, show_progress: bool = True) -> Finished:
    """Read a dataset's manifest and journal.

    Raises:
        DataError: one of them is absent, or the encoder is not the one of then.
    """
    manifest = read_manifest(url)
    plan = journal.read_plan(storage.absolute(url))
    if plan is None:
        raise DataError(f"{url} has no journal (.data-prep): it does not say where its videos came from")
    settings = settings_of(plan["settings"])
    if settings.encoding.record() != manifest.encoding:
        raise DataError(f"{url} was encoded as {manifest.encoding}, this installation would make "
                        f"{settings.encoding.record()}")
    return Finished(storage.absolute(url), manifest, sources.build(plan["source"]), settings,
                    workers or os.cpu_count() or 1, show_progress)


def process_again(dataset: Finished, ids: set[str], staging: str, pool: Executor) -> list[Entry]:
    """Entries of the videos with these source ids, in the dataset's order; their bytes are staged, or stay."""
    listing = dataset.source.listing()
    chosen = sorted((i for i in listing.items if i.source_id in ids),
                    key=lambda i: order_key(dataset.settings.seed, i.source_id))
    if gone := ids.difference(i.source_id for i in chosen):
        raise DataError(f"the source does not name {len(gone)} of the videos any more, for instance {min(gone)!r}")
    outcomes = {slot: o for slot, o in journal.Staging(staging).outcomes().items() if o.kept}
    progress = Progress(len(chosen), "videos", len(outcomes), dataset.show_progress)
    waiting = _from_archives(listing, chosen, outcomes) if listing.archives else iter(
        Handed(slot, item) for slot, item in enumerate(chosen) if slot not in outcomes)
    running = 0
    urls = {slot: item.url for slot, item in enumerate(chosen)}
    more = True
    while more or running:
        while more and pool.room > 0:
            handed = next(waiting, None)
            more = handed is not None
            if handed is not None and (handed.item.url or handed.data is not None):
                task = SampleTask(handed.slot, handed.item.source_id, handed.item.url, dataset.settings.encoding,
                                  staging, handed.data)
                pool.submit(handed.slot, process_sample, task)
                running += 1
        if running:
            done = pool.wait()
            running -= 1
            outcomes[done.ticket] = Outcome("crashed", "worker processes died on it") if done.crashed else done.value
            progress.advance()
    progress.close()
    class_ids = {name: i for i, name in enumerate(dataset.manifest.classes)}
    missing = Outcome("missing_video", "the source names it, there is no file for it")
    stays = not dataset.settings.encoding.transcodes
    return [Entry(slot, slot, item.source_id, item.class_name, class_ids[item.class_name],
                  outcomes.get(slot, missing), sample_key(item.source_id), urls[slot] if stays else "")
            for slot, item in enumerate(chosen)]


def _from_archives(listing: sources.Listing, chosen: list[sources.Item], done: dict[int, Outcome]) -> Iterator[Handed]:
    open_slots = {item.source_id: slot for slot, item in enumerate(chosen) if slot not in done}
    for urls in listing.archives:
        if not open_slots:
            return
        label = urls[0].rsplit("/", 1)[-1]

        def wanted(name: str, label: str = label) -> int | None:
            item = listing.find(f"{label}/{name}")
            return open_slots.get(item.source_id) if item else None

        for member in members(urls, lambda name: wanted(name) is not None):
            slot = None if member.refusal else wanted(member.name)
            if slot is not None:
                del open_slots[chosen[slot].source_id]
                yield Handed(slot, chosen[slot], member.data)


def retry(url: str, workers: int | None = None, show_progress: bool = True) -> Manifest:
    """Process the rejected videos again; those that are good now follow in shards of their own."""
    dataset = open_finished(url, workers, show_progress)
    with journal.only_writer(dataset.url):
        return _retry(dataset)


def _retry(dataset: Finished) -> Manifest:
    old = dataset.manifest
    ids = {r.source_id for r in old.rejected if r.reason != "duplicate"}
    if not ids:
        return old
    staging = dataset.staging("retry")
    pool = LocalExecutor(dataset.workers)
    try:
        entries = process_again(dataset, ids, staging, pool)
    finally:
        pool.close()
    seen = {(sample.crc32, sample.size): sample.source_id for sample in old.samples}
    entries = [_without_twins(entry, seen) for entry in entries]
    shards, samples = list(old.shards), list(old.samples)
    for group in cut_into_shards([e for e in entries if e.outcome.kept], dataset.settings):
        number = len(shards)
        shard, more = write_shard(group, number, dataset.url, journal.Staging(staging), shard_name(number))
        shards.append(shard)
        samples += more
    rejected = [r for r in old.rejected if r.source_id not in ids]
    rejected += [Reject(e.source_id, e.class_name, e.outcome.verdict, e.outcome.detail)
                 for e in entries if not e.outcome.kept]
    manifest = replace(old, shards=shards, samples=samples, rejected=rejected)
    write_manifest(manifest, dataset.url)
    journal.Staging(staging).clear()
    return manifest


def _without_twins(entry: Entry, seen: dict[tuple[int, int], str]) -> Entry:
    """The same encoded bytes under another name are a duplicate; `seen` holds what is kept already."""
    if not entry.outcome.kept:
        return entry
    first = seen.setdefault((entry.outcome.crc32, entry.outcome.size), entry.source_id)
    if first == entry.source_id:
        return entry
    return replace(entry, outcome=Outcome("duplicate", f"the same bytes as {first}", entry.outcome.content))


def repair(url: str, workers: int | None = None, show_progress: bool = True) -> tuple[list[str], dict[int, list[str]]]:
    """Rebuild missing or damaged shards, and only these, from the source.

    Returns the names of what was rebuilt, and what was wrong before. A rebuilt shard has the bytes of the manifest.

    Raises:
        WorkFailed: a video is not what it was, so that the shard cannot be had again.
    """
    wrong = verify_dataset(url, workers, show_progress)
    numbers = [n for n in wrong if n >= 0]
    if not numbers:
        return [], wrong
    dataset = open_finished(url, workers, show_progress)
    with journal.only_writer(dataset.url):
        return _rebuild(dataset, numbers), wrong


def _rebuild(dataset: Finished, numbers: list[int]) -> list[str]:
    manifest = dataset.manifest
    wanted: dict[int, list[Any]] = defaultdict(list)
    for sample in manifest.samples:
        if sample.shard in numbers:
            wanted[sample.shard].append(sample)
    staging = dataset.staging("repair")
    pool = LocalExecutor(dataset.workers)
    try:
        entries = {e.source_id: e for e in process_again(
            dataset, {s.source_id for n in numbers for s in wanted[n]}, staging, pool)}
    finally:
        pool.close()
    for number in numbers:
        group = [entries[s.source_id] for s in wanted[number]]
        for entry, sample in zip(group, wanted[number], strict=True):
            if (entry.outcome.size, entry.outcome.crc32) != (sample.size, sample.crc32):
                raise WorkFailed(f"{manifest.shards[number].url} cannot be rebuilt: {sample.source_id} is now "
                                 f"{entry.outcome.verdict} with other bytes than when it was sharded")
        write_shard(group, number, dataset.url, journal.Staging(staging), manifest.shards[number].url,
                    manifest.shards[number].sha256)
    journal.Staging(staging).clear()
    return [manifest.shards[n].url for n in numbers]
