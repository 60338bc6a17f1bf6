"""A source to a dataset of shards: `shard_dataset`. Read it from there; the rest follows in the order of its calls.

The samples have one order, by a hash of (seed, id), whatever lists or processes them. Shards are ranges of that
order, cut where the target size is reached. Videos are processed in parallel a little ahead of the cutting; so the
tars are the same bytes for any number of workers and any interruptions.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NoReturn

from data_prep import journal, sources
from data_prep.archive_feed import ArchiveFeed
from data_prep.compact import Lookup, TextList
from data_prep.encode import Outcome
from data_prep.executor import Done, Executor, LocalExecutor, Task
from data_prep.order import Feed, FileFeed, in_order
from data_prep.pack import Entry, PackTask, is_full, shard_name, tar_bytes
from data_prep.progress import Progress, say
from data_prep.report import write_reports
from data_prep.settings import PrepSettings
from data_prep.tasks import RESUME, pack_shard, process_sample
from data_prep.verify import extra_shards
from vswin_dist import local_files, storage
from vswin_dist.columns import Builder, Table
from vswin_dist.errors import WorkFailed, after_start, before_start
from vswin_dist.lease import UNFENCED, Fence
from vswin_dist.manifest import FILE_NAME, Manifest, Reject, Sample, Shard, nfc, read_manifest, write_manifest

SPARE_BYTES = 256 << 20  # that may wait for their shard, beside twice the shard's size
SIZE = 16  # bytes of a content's hash
MISSING = Outcome("missing_video", "the source names it, there is no file for it")


def shard_dataset(
    source: sources.Source,
    out: str,
    settings: PrepSettings,
    *,
    classes: list[str] | None = None,
    work: str | None = None,
    executor: Callable[[], Executor] = LocalExecutor,
    show_progress: bool = True,
) -> Manifest:
    """Prepare `source` into shards and a manifest below `out` (any fsspec URL); resume an earlier call that stopped.

    Args:
        classes: class names in the order of their ids, else the sorted names.
        work: folder for what waits to be packed, which every worker must reach.
        executor: starts the workers, once the input was found to be good; by default one process for every core.

    Raises:
        BadInput: the input or the output cannot be used; nothing was written.
        WorkFailed: the work stopped; calling again resumes it.
    """
    out = storage.absolute(out)
    sources.check_url(out)
    with before_start():
        preparation = list_source(source, out, settings, classes, work)
        specification = preparation.specification
        begun = journal.check_specification(out, specification)
        if begun and storage.exists(storage.join(out, FILE_NAME)):
            return read_manifest(out)
        storage.check_writable(out)
    if show_progress:
        say(preparation.listing.notes)
    with journal.only_writer(out) as fence, after_start(RESUME):
        if not begun:
            journal.write_specification(out, specification)
        with executor() as pool:
            manifest = _finish(preparation, pool, fence, show_progress)
        journal.Staging(preparation.staging).clear()
        return manifest


def _finish(preparation: Preparation, pool: Executor, fence: Fence, show_progress: bool) -> Manifest:
    """Publish what is missing: shards, reports, and last the manifest."""
    attempt = Attempt(preparation, pool, show_progress, fence)
    attempt.finish()
    total, unlabelled = attempt.total, TextList(attempt.feed.unlabelled)  # without the paths of all files
    del attempt
    notes = TextList(preparation.listing.notes)
    preparation.forget_items()
    manifest = assemble(preparation, total, notes)
    if show_progress:
        say(notes[len(preparation.listing.notes) :])
        say(note_of_unlisted(manifest, preparation.out))
    write_reports(manifest, preparation.out, unlabelled, notes, pool)
    fence.check()
    write_manifest(manifest, preparation.out)  # last: where it stands, everything stands
    return manifest


@dataclass
class Preparation:
    """A dataset to be made: the items in their order, and where things go."""

    source: sources.Source
    settings: PrepSettings
    classes: list[str]
    items: sources.Items  # all of the source's, in the dataset's order where they are files
    listing: sources.Listing
    out: str
    staging: str = ""

    @cached_property
    def specification(self) -> dict[str, Any]:
        """What describes to the journal all that decides the bytes, and how to list the source again."""
        order = hashlib.sha256()
        for index in range(len(self.items)):
            order.update(f"{self.items.source_id(index)}\t{self.items.class_name(index)}\n".encode())
        return {
            "source": sources.spec(self.source),
            "settings": self.settings.record(),
            "classes": self.classes,
            "videos": len(self.items),
            "order": order.hexdigest()[:32],
            "archives": self.listing.archives,
        }

    def feed(self, ranges: dict[int, journal.ShardRange], staged: Collection[int]) -> Feed:
        """Begin to hand out the videos that are neither in a record nor staged."""
        if not self.listing.archives:
            return FileFeed(self.items, self.listing.unlabelled, ranges, staged)
        done = bytearray(len(self.items))
        for index in itertools.chain(staged, *(finished.covered for finished in ranges.values())):
            done[index] = True
        return ArchiveFeed(
            self.out, self.items, self.listing.archives, self.listing.find, self.settings.window, self.settings.seed, done
        )

    def forget_items(self) -> None:
        """Let go of what the manifest's assembling needs the memory of."""
        self.items = sources.Items()
        self.listing = sources.Listing(self.items, notes=self.listing.notes)


def list_source(
    source: sources.Source, out: str, settings: PrepSettings, classes: list[str] | None, work: str | None
) -> Preparation:
    """List the source and put it in order. Nothing is written.

    Raises:
        DataError, ConfigError: it cannot be used.
    """
    for value in vars(source).values():
        if isinstance(value, str):
            sources.check_url(value)
    listing = source.listing()
    for url in (url for urls in listing.archives for url in urls):
        sources.check_url(url)
    names = sources.class_list(listing.items, classes or listing.classes)
    listing.notes += sources.note_of_empty(listing, names)
    preparation = Preparation(source, settings, names, in_order(listing.items, settings.seed), listing, out)
    if work or not storage.is_local(out):
        # The output's name and the specification part runs that share a work folder.
        digest = hashlib.sha256(f"{out}\n{preparation.specification}".encode()).hexdigest()[:16]
        preparation.staging = storage.join(storage.absolute(work) if work else str(local_files.home() / "data-prep"), digest)
    else:
        preparation.staging = storage.join(journal.folder(out), "staging")
    return preparation


class Contents:
    """What was kept so far, by its content: `SIZE` bytes of each, and where its id is to be found."""

    def __init__(self, out: str) -> None:
        self._out = out
        self._contents, self._places = bytearray(), array("q")  # a position; of a record, -1 - its start
        self._numbers = Lookup(self._content)

    def add(self, content: str, position: int) -> None:
        """Add the video at `position`; the first one with its content counts."""
        key = bytes.fromhex(content)
        assert len(key) == SIZE, f"{content} is no hash of a video"
        if self._numbers.add(key, len(self._places)) == len(self._places):
            self._contents += key
            self._places.append(position)

    def add_record(self, record: journal.ShardRecord) -> None:
        """Add the videos of a record."""
        for content in record.contents:
            self.add(content, -1 - record.start)

    def first(self, content: str, feed: Feed) -> str:
        """Give the id of the first video with this content, "" where there is none."""
        number = self._numbers.find(bytes.fromhex(content))
        if number < 0:
            return ""
        place = self._places[number]
        if place >= 0:
            return feed.item_at(place).source_id
        record = journal.read_record(self._out, -1 - place)
        return record.samples[record.contents.index(content)].source_id

    def _content(self, number: int) -> bytes:
        return bytes(self._contents[SIZE * number : SIZE * (number + 1)])


class Attempt:
    """Processes what is not yet finished of a preparation, once through."""

    def __init__(self, preparation: Preparation, executor: Executor, show_progress: bool, fence: Fence = UNFENCED) -> None:
        self.preparation = preparation
        self.fence = fence
        self.settings = preparation.settings
        self.executor = executor
        self.ranges = journal.read_ranges(preparation.out)
        self.outcomes = journal.Staging(preparation.staging).outcomes()  # by index: processed, not yet in a shard
        if self.outcomes:  # a run that was killed may not have removed what it had packed
            for index in (index for finished in self.ranges.values() for index in finished.covered):
                self.outcomes.pop(index, None)
        self.feed = preparation.feed(self.ranges, frozenset(self.outcomes))
        self.process = partial(process_sample, self.settings.encoding, preparation.staging)
        self.class_ids = sources.class_ids(preparation.classes)
        self.total = len(preparation.items)
        self.cut = 0  # the next position to put into a shard
        self.number = 0  # of the shard being filled
        self.open: list[Entry] = []  # its entries
        self.open_bytes = self.open_kept = 0
        self.full: deque[PackTask] = deque()  # shards to be packed
        self.waiting_bytes = sum(o.size for o in self.outcomes.values())  # not yet packed
        self.running = 0
        self.rejected = 0
        self.seen = Contents(preparation.out)
        finished = len(self.outcomes) + sum(r.end - r.start for r in self.ranges.values())
        self.progress = Progress(self.total, "videos", finished, show_progress)

    def finish(self) -> None:
        """Run until every shard is published and recorded.

        Raises:
            WorkFailed: the work stopped.
        """
        try:
            for done in self.executor.run(self._tasks()):
                self._take(done)
        finally:
            self.feed.close()
        if self.cut < self.total:
            raise WorkFailed(
                f"the journal of {self.preparation.out} does not fit position {self.cut}; remove the output and start anew"
            )
        self.progress.close(f", {self.rejected:,} rejected")

    def _tasks(self) -> Iterator[Task | None]:
        """Shards to pack, before videos to process; None where these must wait for a running task."""
        self._advance()
        while True:
            if self.full:
                shard = self.full.popleft()
                task = Task(("shard", shard.number), pack_shard, shard)
            elif self._may_hand_out() and (video := self.feed.next()) is not None:
                if not video.item.url and video.data is None:
                    self._arrived(video.index, MISSING)
                    continue
                task = Task(("video", video.index), self.process, video)
            elif self.running:
                yield None
                continue
            elif self._advance():  # the order of an archive's last window is known only at its end
                continue
            else:
                return
            self.running += 1
            yield task

    def _may_hand_out(self) -> bool:
        """Return False where enough waits for its shard. Archives continue to the end of their window, to have its order."""
        limit = 2 * self.settings.shard_bytes + SPARE_BYTES
        enough = self.waiting_bytes > limit and self.running and not self.preparation.listing.archives
        return not enough and not self.feed.is_ahead(self.cut)

    def _take(self, done: Done) -> None:
        self.running -= 1
        kind, number = done.ticket
        if kind == "video":
            self._arrived(number, Outcome("crashed", done.crashed) if done.crashed else done.value)
        elif done.crashed:
            raise WorkFailed(f"worker processes die while writing shard {number} ({done.crashed}); is there enough memory?")
        else:
            self.waiting_bytes -= sum(s.size for s in done.value.samples)

    def _arrived(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        self.waiting_bytes += outcome.size
        self._advance()
        self.progress.advance(note=f"{self.rejected:,} rejected, {self.number} shards")

    def _advance(self) -> bool:
        """Put outcomes into shards, in order, as far as they are there; says whether there were any."""
        before = self.cut
        while self.cut < self.total:
            if self.cut in self.ranges:
                if self.open:  # a later shard was finished before this one
                    self._close_shard()
                self._skip(journal.read_record(self.preparation.out, self.cut))
                continue
            index = self.feed.index_at(self.cut)
            if index is None or index not in self.outcomes:
                return self.cut > before
            entry = self._entry(self.cut, index, self.outcomes[index])
            if entry.outcome.kept and self._is_full(entry.outcome):
                self._close_shard()
                continue
            del self.outcomes[entry.index]
            self.open.append(entry)
            self._count(entry)
            self.cut += 1
        if self.open:
            self._close_shard()
        return self.cut > before

    def _skip(self, record: journal.ShardRecord) -> None:
        if record.number != self.number:
            self._forget(record.start)
        self.seen.add_record(record)
        self.rejected += len(record.rejected)
        self.cut = record.end
        self.number = record.number + (record.shard is not None)

    def _entry(self, position: int, index: int, outcome: Outcome) -> Entry:
        item = self.feed.item_at(position)
        if outcome.kept and not self.settings.keep_duplicates and (first := self.seen.first(outcome.content, self.feed)):
            self.waiting_bytes -= outcome.size
            outcome = Outcome("duplicate", f"the same bytes as {first}", outcome.content)
        class_id = self.class_ids[nfc(item.class_name)]
        if (name := self.preparation.classes[class_id]) != item.class_name:  # which the class list writes otherwise
            item = replace(item, class_name=name)
        return Entry(position, index, item, class_id, outcome, not self.settings.encoding.transcodes)

    def _is_full(self, outcome: Outcome) -> bool:
        return is_full(self.open_kept, self.open_bytes, outcome, self.settings)

    def _count(self, entry: Entry) -> None:
        if entry.outcome.kept:
            self.open_bytes += tar_bytes(entry.outcome)
            self.open_kept += 1
            self.seen.add(entry.outcome.content, entry.position)
        else:
            self.rejected += 1

    def _close_shard(self) -> None:
        start, end = self.open[0].position, self.open[-1].position + 1
        following = min((later for later in self.ranges if later >= end), default=None)
        if following is not None and self.number + (self.open_kept > 0) > self.ranges[following].number:
            self._forget(following)
        archives = bool(self.preparation.listing.archives)
        self.full.append(
            PackTask(self.number, start, end, self.open, self.preparation.out, self.preparation.staging, archives)
        )
        self.number += self.open_kept > 0
        self.open, self.open_bytes, self.open_kept = [], 0, 0

    def _forget(self, start: int) -> NoReturn:
        """Remove the shards from position `start` on, before which there are now more or fewer than when they were made.

        They were finished before an earlier one, and what became of its videos has changed, as of one that was missing.

        Raises:
            WorkFailed: always; the next run makes them anew. FencedOut: they are another run's now.
        """
        self.fence.check()
        out = self.preparation.out
        following = sorted(later for later in self.ranges if later >= start)
        for later in following:
            storage.remove(journal.record_url(out, later))
            if (number := self.ranges[later].number) >= self.number:  # else it is that of another record
                storage.remove(storage.join(out, shard_name(number)))
        raise WorkFailed(
            f"videos before position {start} came out otherwise than in an earlier run, which had finished shards after "
            f"them: these ({len(following)}) were removed, to be made again under other numbers. {RESUME}"
        )


def assemble(preparation: Preparation, total: int, notes: TextList) -> Manifest:
    """Make the manifest of a finished preparation from its records, and add to `notes` what these say of its samples.

    Raises:
        WorkFailed: not one video was kept, or a record is missing.
    """
    settings = preparation.settings
    shards: list[Shard] = []
    samples, rejected = Builder(Sample), Builder(Reject)
    covered = 0
    while covered < total:
        try:
            record = journal.read_record(preparation.out, covered)
        except FileNotFoundError as error:
            raise WorkFailed(
                f"the journal of {preparation.out} accounts for {covered} of {total} videos; run again"
            ) from error
        covered = record.end
        shards += [record.shard] if record.shard else []
        samples.extend(record.samples)
        rejected.extend(record.rejected)
        notes.extend(record.notes)
    manifest = Manifest(
        settings.name,
        settings.split,
        preparation.classes,
        settings.encoding.record(),
        Table.of(Shard, shards),
        samples.table(),
        rejected.table(),
        total,
        settings.sampling,
    )
    if not manifest.samples:
        reasons = ", ".join(f"{n} {reason}" for reason, n in manifest.counts["reasons"].items())
        raise WorkFailed(
            f"not one of {manifest.read} videos could be kept: {reasons}. Once the videos are right, remove "
            f"{journal.folder(preparation.out)}, where this stands, and run the same command again"
        )
    return manifest


def note_of_unlisted(manifest: Manifest, out: str) -> list[str]:
    """Say which tars beside the manifest no record knows: `retry` makes such, and lists them once it has run again."""
    extra = extra_shards(manifest, out)
    remedy = f"If data-prep retry made them, run data-prep retry {out} again: it makes and lists them anew"
    return [f"{sources.some(extra)}: not listed, since the journal knows nothing of them. {remedy}"] if extra else []
