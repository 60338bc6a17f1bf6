"""A source to a dataset of shards: `shard_dataset`. Read it from there; the rest follows in the order of its calls.

The samples have one order, by a hash of (seed, id), whatever lists or processes them. Shards are stretches of that
order, cut where the target size is reached. Videos are processed in parallel a little ahead of the cutting; so the
tars are the same bytes for any number of workers and any interruptions.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from data_prep import journal, sources
from data_prep.encode import Outcome
from data_prep.executor import Executor, LocalExecutor
from data_prep.feed import ArchiveFeed, Feed, FileFeed, order_key
from data_prep.pack import Entry, PackTask, is_full, tar_bytes
from data_prep.progress import Progress
from data_prep.report import write_reports
from data_prep.settings import Settings
from data_prep.tasks import SampleTask, pack_shard, process_sample
from vswin_dist import storage
from vswin_dist.errors import WorkFailed
from vswin_dist.manifest import FILE_NAME, Manifest, read_manifest, write_manifest

SPARE_BYTES = 256 << 20  # that may wait for their shard, beside twice the shard's size


def shard_dataset(source: sources.Source, out: str, settings: Settings, *, classes: list[str] | None = None,
                  workers: int | None = None, work: str | None = None, ray_address: str | None = None,
                  executor: Executor | None = None, show_progress: bool = True) -> Manifest:
    """Prepare `source` into shards and a manifest below `out` (any fsspec URL); goes on where an earlier call stopped.

    `classes` gives the class names in the order of their ids (else the sorted names). `workers` is the number of
    local processes (default: the cores), `work` a folder for what waits to be packed. `ray_address` names a Ray
    cluster to work on instead of local processes; `executor` replaces either.

    Raises:
        DataError, ConfigError: the input cannot be used; nothing was written.
        WorkFailed: the work stopped; calling again goes on.
    """
    out = storage.absolute(out)
    sources.check_url(out)
    if ray_address and not work:
        work = journal.folder(out)  # where every node finds it
    job = plan(source, out, settings, classes, work)
    begun = journal.check_plan(out, job.record())
    if begun and storage.exists(storage.join(out, FILE_NAME)):
        return read_manifest(out)
    storage.check_writable(out)
    with journal.only_writer(out):
        if not begun:
            journal.write_plan(out, job.record())
        pool = executor or _pool(workers, ray_address)
        try:
            run = Run(job, pool, show_progress)
            run.finish()
            total, unnamed = run.total, run.feed.unnamed
            del run
            job.items.clear()  # hundreds of megabytes at the size of Kinetics, and the manifest takes as much
            manifest = assemble(job, total)
            write_reports(manifest, out, unnamed, pool)
            write_manifest(manifest, out)  # last: where it stands, everything stands
        finally:
            pool.close()
        journal.Staging(job.staging).clear()
        return manifest


def _pool(workers: int | None, ray_address: str | None) -> Executor:
    if ray_address is None:
        return LocalExecutor(workers or os.cpu_count() or 1)
    from data_prep.ray_executor import RayExecutor
    return RayExecutor(ray_address, workers)


@dataclass
class Job:
    """A dataset to be made: the items in their order, and where things go."""

    source: sources.Source
    settings: Settings
    classes: list[str]
    items: list[sources.Item]  # all of the source's; where they are files, in the dataset's order
    listing: sources.Listing
    out: str
    staging: str = ""

    def record(self) -> dict[str, Any]:
        """The journal's plan: all that decides the bytes, and how to list the source again."""
        order = hashlib.sha256()
        for item in self.items:
            order.update(f"{item.source_id}\t{item.class_name}\n".encode())
        return {"source": sources.spec(self.source), "settings": self.settings.record(), "classes": self.classes,
                "videos": len(self.items), "order": order.hexdigest()[:32],
                "archives": self.listing.archives}

    def feed(self, records: dict[int, journal.Stretch], staged: Collection[int]) -> Feed:
        """What hands out the videos that are neither in a record nor staged."""
        if not self.listing.archives:
            return FileFeed(self.items, self.listing.unnamed, records, staged)
        done = {slot for record in records.values() for slot in record.slots}.union(staged)
        return ArchiveFeed(self.out, self.items, self.listing.archives, self.listing.find, self.settings.window,
                           self.settings.seed, done)


def plan(source: sources.Source, out: str, settings: Settings, classes: list[str] | None, work: str | None) -> Job:
    """List the source and put it in order. Nothing is written."""
    for value in vars(source).values():
        if isinstance(value, str):
            sources.check_url(value)
    listing = source.listing()
    for url in (url for urls in listing.archives for url in urls):
        sources.check_url(url)
    names = sources.class_list(listing.items, classes or listing.classes)
    listing.items.sort(key=lambda item: order_key(settings.seed, item.source_id))
    job = Job(source, settings, names, listing.items, listing, out)
    if work or not storage.is_local(out):
        # The output's name and the plan part runs that share a work folder.
        digest = hashlib.sha256(f"{out}\n{job.record()}".encode()).hexdigest()[:16]
        job.staging = storage.join(storage.absolute(work) if work else str(storage.home() / "data-prep"), digest)
    else:
        job.staging = storage.join(journal.folder(out), "staging")
    return job


def sample_key(source_id: str) -> str:
    """A readable name without dots, unique for every source id: WebDataset cuts keys at the first dot."""
    stem = re.sub(r"\.\w{2,4}$", "", source_id)
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[-48:]
    return f"{slug or 'video'}-{hashlib.sha256(source_id.encode()).hexdigest()[:10]}"


class Run:
    """Processes what is not yet finished of a job. One object per attempt."""

    def __init__(self, job: Job, executor: Executor, show_progress: bool) -> None:
        self.job = job
        self.executor = executor
        self.records = journal.read_stretches(job.out)
        self.outcomes = journal.Staging(job.staging).outcomes()  # by slot: processed, not yet in a shard
        if self.outcomes:  # a run that was killed may not have removed what it had packed
            for record in self.records.values():
                for slot in record.slots or range(record.start, record.end):
                    self.outcomes.pop(slot, None)
        self.feed = job.feed(self.records, frozenset(self.outcomes))
        self.class_ids = {name: i for i, name in enumerate(job.classes)}
        self.total = len(job.items)
        self.cut = 0  # the next position to put into a shard
        self.number = 0  # of the shard being filled
        self.open: list[Entry] = []  # its entries
        self.open_bytes = self.open_kept = 0
        self.waiting_bytes = sum(o.size for o in self.outcomes.values())  # not yet packed
        self.running = 0
        self.rejected = 0
        self.seen: dict[bytes, str] = {}  # content -> first id with it
        finished = len(self.outcomes) + sum(r.end - r.start for r in self.records.values())
        self.progress = Progress(self.total, "videos", finished, show_progress)

    def finish(self) -> None:
        """Run until every shard is published and recorded."""
        try:
            self._loop()
        finally:
            self.feed.close()
        self.progress.close(f", {self.rejected:,} rejected")

    def _loop(self) -> None:
        self._advance()
        while self.cut < self.total or self.running:
            self._hand_out()
            if not self.running:
                before = self.cut
                self._advance()
                if self.cut == before and not self.running and self.cut < self.total:
                    raise WorkFailed(f"the journal of {self.job.out} does not fit position {self.cut}; "
                                     "remove the output and start anew")
                continue
            done = self.executor.wait()
            self.running -= 1
            kind, number = done.ticket
            if kind == "shard":
                if done.crashed:
                    raise WorkFailed(f"worker processes die while writing shard {number}; is there enough memory?")
                self.waiting_bytes -= sum(s.size for s in done.value.samples)
            else:
                outcome = Outcome("crashed", "worker processes died on it") if done.crashed else done.value
                self._arrived(number, outcome)

    def _arrived(self, slot: int, outcome: Outcome) -> None:
        self.outcomes[slot] = outcome
        self.waiting_bytes += outcome.size
        self._advance()
        self.progress.advance(note=f"  {self.rejected:,} rejected  {self.number} shards")

    def _hand_out(self) -> None:
        """Submit videos while the workers have room and not too much waits for its shard."""
        limit = 2 * self.job.settings.shard_bytes + SPARE_BYTES
        while self.executor.room > 0 and not self.feed.is_ahead(self.cut):
            if self.waiting_bytes > limit and self.running and not self.job.listing.archives:
                return
            handed = self.feed.next()
            if handed is None:
                return
            item = handed.item
            if not item.url and handed.data is None:
                self._arrived(handed.slot, Outcome("missing_video", "the source names it, there is no file for it"))
                continue
            self._submit(("video", handed.slot), process_sample, SampleTask(
                handed.slot, item.source_id, item.url, self.job.settings.encoding, self.job.staging, handed.data))

    def _submit(self, ticket: tuple[str, int], function: Any, task: Any) -> None:
        self.executor.submit(ticket, function, task)
        self.running += 1

    def _advance(self) -> None:
        """Put outcomes into shards, in order, as far as they are there."""
        while self.cut < self.total:
            if self.cut in self.records:
                if self.open:  # a later shard was finished before this one
                    self._close_shard()
                self._skip(journal.read_record(self.job.out, self.cut))
                continue
            place = self.feed.at(self.cut)
            outcome = self.outcomes.get(place[0]) if place else None
            if place is None or outcome is None:
                return
            entry = self._entry(self.cut, *place, outcome)
            if entry.outcome.kept and self._is_full(entry.outcome):
                self._close_shard()
                continue
            del self.outcomes[entry.slot]
            self.open.append(entry)
            self._count(entry)
            self.cut += 1
        if self.open:
            self._close_shard()

    def _skip(self, record: journal.Record) -> None:
        for sample, content in zip(record.samples, record.contents, strict=True):
            self.seen.setdefault(bytes.fromhex(content), sample.source_id)
        self.rejected += len(record.rejected)
        self.cut = record.end
        self.number = record.number + (record.shard is not None)

    def _entry(self, position: int, slot: int, item: sources.Item, outcome: Outcome) -> Entry:
        first = self.seen.get(bytes.fromhex(outcome.content)) if outcome.kept else None
        if first is not None and not self.job.settings.keep_duplicates:
            self.waiting_bytes -= outcome.size
            outcome = Outcome("duplicate", f"the same bytes as {first}", outcome.content)
        stays = outcome.kept and not self.job.settings.encoding.transcodes
        return Entry(position, slot, item.source_id, item.class_name, self.class_ids[item.class_name], outcome,
                     sample_key(item.source_id), item.url if stays else "")

    def _is_full(self, outcome: Outcome) -> bool:
        return is_full(self.open_kept, self.open_bytes, outcome, self.job.settings)

    def _count(self, entry: Entry) -> None:
        if entry.outcome.kept:
            self.open_bytes += tar_bytes(entry.outcome)
            self.open_kept += 1
            self.seen.setdefault(bytes.fromhex(entry.outcome.content), entry.source_id)
        else:
            self.rejected += 1

    def _close_shard(self) -> None:
        start, end = self.open[0].position, self.open[-1].position + 1
        self._submit(("shard", self.number), pack_shard,
                     PackTask(self.number, start, end, self.open, self.job.out, self.job.staging,
                              bool(self.job.listing.archives)))
        self.number += self.open_kept > 0
        self.open, self.open_bytes, self.open_kept = [], 0, 0


def assemble(job: Job, total: int) -> Manifest:
    """The manifest of a finished job, from its records.

    Raises:
        WorkFailed: not one video was kept, or a record is missing.
    """
    settings = job.settings
    manifest = Manifest(settings.name, settings.split, job.classes, settings.encoding.record(), [], [], [], total,
                        settings.sampling)
    covered = 0
    while covered < total:
        try:
            record = journal.read_record(job.out, covered)
        except FileNotFoundError as error:
            raise WorkFailed(f"the journal of {job.out} accounts for {covered} of {total} videos; run again") from error
        covered = record.end
        manifest.shards.extend([record.shard] if record.shard else [])
        manifest.samples.extend(record.samples)
        manifest.rejected.extend(record.rejected)
    if not manifest.samples:
        reasons = ", ".join(f"{n} {reason}" for reason, n in manifest.counts["reasons"].items())
        raise WorkFailed(f"not one of {manifest.read} videos could be kept: {reasons}")
    return manifest
