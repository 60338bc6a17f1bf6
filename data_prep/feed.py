"""Which video comes next, and where it stands in the dataset's order.

A *slot* numbers the videos as they are handed to the workers; a *position* is the place in the dataset's order. For
files both are the same: the order is known before the first video is read. Archives are read in sequence, so their
videos are handed out as they come, and each window of them is shuffled when its end is reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from data_prep import journal
from data_prep.archive import members
from data_prep.sources.base import Item

AHEAD = 20_000  # positions of files that may be processed before their shard is cut
READ_AHEAD = 8  # members of archives held in memory


def order_key(seed: int, source_id: str) -> bytes:
    """Where an id stands in the shuffled order: the same for every listing order and Python version."""
    return hashlib.blake2b(f"{seed}\0{source_id}".encode(), digest_size=12).digest()


@dataclass(frozen=True)
class Handed:
    """One video to process; `data` where it was read from an archive."""

    slot: int
    item: Item
    data: bytes | None = None


class Feed(Protocol):
    """Hands out the videos of a job that are not done."""

    unnamed: list[str]  # what lies there without a row

    def next(self) -> Handed | None:
        """The next video, None where there is none left."""

    def is_ahead(self, cut: int) -> bool:
        """True where enough has been handed out beyond position `cut`."""

    def at(self, position: int) -> tuple[int, Item] | None:
        """Slot and item of a position, None where it is not known yet."""

    def close(self) -> None:
        """Stop reading."""


class FileFeed:
    """Videos in files, already in the dataset's order."""

    def __init__(self, items: list[Item], unnamed: list[str], records: Mapping[int, journal.Stretch],
                 staged: Collection[int]) -> None:
        self.items = items
        self.unnamed = unnamed
        self._records = records
        self._staged = staged
        self._next = 0

    def next(self) -> Handed | None:
        """See `Feed.next`."""
        while self._next < len(self.items):
            if record := self._records.get(self._next):
                self._next = record.end
                continue
            slot, self._next = self._next, self._next + 1
            if slot not in self._staged:
                return Handed(slot, self.items[slot])
        return None

    def is_ahead(self, cut: int) -> bool:
        """See `Feed.is_ahead`."""
        return self._next - cut > AHEAD

    def at(self, position: int) -> tuple[int, Item]:
        """See `Feed.at`."""
        return position, self.items[position]

    def close(self) -> None:
        """See `Feed.close`."""


class ArchiveFeed:
    """Videos in archives, read by one thread in sequence; rows that no archive has come last."""

    def __init__(self, out: str, rows: list[Item], archives: list[list[str]], find: Callable[[str], Item | None],
                 window: int, seed: int, done: Collection[int]) -> None:
        self.unnamed: list[str] = []
        self._out = out
        self._rows = rows
        self._archives = archives
        self._find = find
        self._window = window
        self._seed = seed
        self._done = done
        self._by_slot: list[Item] = []  # written by the thread alone, only ever appended to
        self._order: list[int] = []  # position -> slot, likewise
        self._taken: set[str] = set()
        self._handed = -1
        self._stop = threading.Event()
        self._queue: queue.Queue[Handed | BaseException | None] = queue.Queue(READ_AHEAD)
        self._thread = threading.Thread(target=self._run, daemon=True, name="archive-reader")
        self._thread.start()

    def next(self) -> Handed | None:
        """See `Feed.next`. Raises what reading raised."""
        got = self._queue.get()
        if isinstance(got, Handed):
            self._handed = got.slot
            return got
        self._queue.put(got)  # the end stays the end
        if got is not None:
            raise got
        return None

    def is_ahead(self, cut: int) -> bool:
        """See `Feed.is_ahead`: two windows, so that the one at `cut` is always complete."""
        return self._handed - cut >= 2 * self._window

    def at(self, position: int) -> tuple[int, Item] | None:
        """See `Feed.at`."""
        if position >= len(self._order):
            return None
        slot = self._order[position]
        return slot, self._by_slot[slot]

    def close(self) -> None:
        """See `Feed.close`."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for handed in self._read():
                if not self._put(handed):
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, what: Handed | BaseException | None) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(what, timeout=0.2)
                return True
        return False

    def _read(self) -> Iterator[Handed]:
        for number, urls in enumerate(self._archives):
            part = journal.read_part(self._out, number)
            first = len(self._by_slot)
            if part is not None and all(first + i in self._done for i in range(len(part.ids))):
                self._pass_over(part)
                continue
            names = len(self.unnamed)
            yield from self._read_archive(urls, first)
            ids = [item.source_id for item in self._by_slot[first:]]
            journal.write_part(self._out, number, journal.Part(ids, self.unnamed[names:]))
        # None of the archives has the rest. They are no window of their own: their order is that of the whole set.
        for row in sorted((r for r in self._rows if r.source_id not in self._taken),
                          key=lambda r: order_key(self._seed, r.source_id)):
            slot = len(self._by_slot)
            self._by_slot.append(row)
            self._order.append(slot)
            if slot not in self._done:
                yield Handed(slot, row)

    def _read_archive(self, urls: list[str], first: int) -> Iterator[Handed]:
        label = urls[0].rsplit("/", 1)[-1]

        def new(name: str) -> Item | None:
            item = self._find(f"{label}/{name}")
            return None if item is None or item.source_id in self._taken else item

        for member in members(urls, lambda name: new(name) is not None and len(self._by_slot) not in self._done):
            item = None if member.refusal else new(member.name)
            if item is None:
                refused = f" (refused: {member.refusal})" if member.refusal else ""
                self.unnamed.append(f"{label}/{member.name}{refused}")
                continue
            slot = len(self._by_slot)
            self._take(item)
            if slot not in self._done:
                yield Handed(slot, item, member.data)
            if (slot + 1 - first) % self._window == 0:
                self._close_window()
        self._close_window()

    def _pass_over(self, part: journal.Part) -> None:
        """Account for a finished archive without reading it."""
        by_id = {row.source_id: row for row in self._rows}
        for count, source_id in enumerate(part.ids, 1):
            self._take(by_id[source_id])
            if count % self._window == 0:
                self._close_window()
        self._close_window()
        self.unnamed += part.unnamed

    def _take(self, item: Item) -> None:
        self._taken.add(item.source_id)
        self._by_slot.append(item)

    def _close_window(self) -> None:
        """Shuffle the videos that came since the last window was closed."""
        slots = range(len(self._order), len(self._by_slot))
        self._order.extend(sorted(slots, key=lambda s: order_key(self._seed, self._by_slot[s].source_id)))
