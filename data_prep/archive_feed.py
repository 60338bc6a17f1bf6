"""Videos in tar archives, handed out as they are read, in an order that is shuffled window by window."""

from __future__ import annotations

import contextlib
import queue
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence

from data_prep import journal
from data_prep.archive import members
from data_prep.compact import Lookup, TextList
from data_prep.order import order_key
from data_prep.sources.items import Item, Items
from data_prep.tasks import SampleTask

READ_AHEAD = 8  # members of archives held in memory


class ArchiveFeed:
    """Videos in archives, read by one thread in sequence; rows that no archive has come last."""

    def __init__(
        self,
        out: str,
        rows: Items,
        archives: list[list[str]],
        find: Callable[[str], Sequence[Item]],
        window: int,
        seed: int,
        done: bytearray,
    ) -> None:
        """Begin to read; `done` says by a 1 which indices are."""
        self.unlabelled = TextList()
        self._out = out
        self._rows = rows
        self._archives = archives
        self._find = find
        self._window = window
        self._seed = seed
        self._done = done
        self._numbers = Lookup(rows.source_id)
        for number in range(len(rows)):
            self._numbers.add(rows.source_id(number), number)
        self._came = array("i")  # rows' numbers by index; written by the thread alone, only ever appended to
        self._order = array("i")  # indices by position, likewise
        self._taken = bytearray(len(rows))  # by the row's number
        self._handed = -1
        self._stop = threading.Event()
        self._queue: queue.Queue[SampleTask | BaseException | None] = queue.Queue(READ_AHEAD)
        self._thread = threading.Thread(target=self._run, daemon=True, name="archive-reader")
        self._thread.start()

    def next(self) -> SampleTask | None:
        """See `Feed.next`. Raises what reading raised."""
        got = self._queue.get()
        if isinstance(got, SampleTask):
            self._handed = got.index
            return got
        self._queue.put(got)  # the end stays the end
        if got is not None:
            raise got
        return None

    def is_ahead(self, cut: int) -> bool:
        """See `Feed.is_ahead`: two windows, so that the one at `cut` is always complete."""
        return self._handed - cut >= 2 * self._window

    def index_at(self, position: int) -> int | None:
        """See `Feed.index_at`."""
        return self._order[position] if position < len(self._order) else None

    def item_at(self, position: int) -> Item:
        """See `Feed.item_at`."""
        return self._rows[self._came[self._order[position]]]

    def close(self) -> None:
        """See `Feed.close`."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        last: BaseException | None = None
        try:
            for task in self._read():
                if not self._put(task):
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, what: SampleTask | BaseException | None) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(what, timeout=0.2)
                return True
        return False

    def _read(self) -> Iterator[SampleTask]:
        for number, urls in enumerate(self._archives):
            part = journal.read_part(self._out, number)
            first = len(self._came)
            if part is not None and self._done.count(1, first, first + len(part.ids)) == len(part.ids):
                self._skip(part)
                continue
            names = len(self.unlabelled)
            yield from self._read_archive(urls, first)
            ids = [self._rows.source_id(row) for row in self._came[first:]]
            journal.write_part(self._out, number, journal.Part(ids, self.unlabelled[names:]))
        # None of the archives has the rest. They are no window of their own: their order is that of the whole set.
        for row in range(len(self._rows)):
            if not self._taken[row]:
                index = len(self._came)
                self._came.append(row)
                self._order.append(index)
                if not self._done[index]:
                    yield SampleTask(index, self._rows[row])

    def _read_archive(self, urls: list[str], first: int) -> Iterator[SampleTask]:
        label = urls[0].rsplit("/", 1)[-1]

        def new(name: str) -> list[Item]:
            found = self._find(f"{label}/{name}")
            return [item for item in found if not self._taken[self._numbers.find(item.source_id)]]

        def wanted(name: str) -> bool:
            return any(not self._done[index] for index, _ in enumerate(new(name), len(self._came)))

        for member in members(urls, wanted):
            items = [] if member.refusal else new(member.name)
            if not items:
                refused = f" (refused: {member.refusal})" if member.refusal else ""
                self.unlabelled.append(f"{label}/{member.name}{refused}")
            for item in items:  # several where it is a film of which rows mean stretches
                index = len(self._came)
                self._take(item.source_id)
                if not self._done[index]:
                    yield SampleTask(index, item, member.data)
                if (index + 1 - first) % self._window == 0:
                    self._close_window()
        self._close_window()

    def _skip(self, part: journal.Part) -> None:
        """Account for a finished archive without reading it."""
        for count, source_id in enumerate(part.ids, 1):
            self._take(source_id)
            if count % self._window == 0:
                self._close_window()
        self._close_window()
        self.unlabelled.extend(part.unlabelled)

    def _take(self, source_id: str) -> None:
        row = self._numbers.find(source_id)
        assert row >= 0, f"{source_id} is not of this source"
        self._taken[row] = True
        self._came.append(row)

    def _close_window(self) -> None:
        """Shuffle the videos that came since the last window was closed."""
        indices = range(len(self._order), len(self._came))
        self._order.extend(sorted(indices, key=lambda i: order_key(self._seed, self._rows.source_id(self._came[i]))))
