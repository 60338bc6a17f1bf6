"""Which video comes next, and where it stands in the dataset's order.

An *index* numbers the videos as they are handed to the workers; a *position* is where one stands in the dataset's
order. For files both are the same: the order is known before the first video is read. Archives are read in sequence,
so their videos are handed out as they come, and each window of them is shuffled when its end is reached (see
`archive_feed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from data_prep import journal
from data_prep.sources.items import Item, Items
from data_prep.tasks import SampleTask

AHEAD = 20_000  # positions of files that may be processed before their shard is cut


def order_key(seed: int, source_id: str) -> bytes:
    """Give the sort key of an id in the shuffled order: the same for every listing order and Python version."""
    return hashlib.blake2b(f"{seed}\0{source_id}".encode(), digest_size=12).digest()


def in_order(items: Items, seed: int) -> Items:
    """Put `items` in the order of their keys."""
    keys = bytearray()
    for index in range(len(items)):
        keys += order_key(seed, items.source_id(index))
    parts = np.frombuffer(keys, [("first", ">u8"), ("last", ">u4")])
    return items.reordered(np.lexsort((parts["last"].astype(np.uint32), parts["first"].astype(np.uint64))))


class Feed(Protocol):
    """Hands out the videos of a dataset that are not done."""

    @property
    def unlabelled(self) -> Sequence[str]:
        """Videos that no row names."""

    def next(self) -> SampleTask | None:
        """Hand out the next video, None where there is none left."""

    def is_ahead(self, cut: int) -> bool:
        """Say whether enough has been handed out beyond position `cut`."""

    def index_at(self, position: int) -> int | None:
        """Give the index of a position, None where it is not known yet."""

    def item_at(self, position: int) -> Item:
        """Give the item of a position that is known."""

    def close(self) -> None:
        """Stop reading."""


class FileFeed:
    """Videos in files, already in the dataset's order."""

    def __init__(
        self, items: Items, unlabelled: Sequence[str], ranges: Mapping[int, journal.ShardRange], staged: Collection[int]
    ) -> None:
        self.items = items
        self.unlabelled = unlabelled
        self._ranges = ranges
        self._staged = staged
        self._next = 0

    def next(self) -> SampleTask | None:
        """See `Feed.next`."""
        while self._next < len(self.items):
            if finished := self._ranges.get(self._next):
                self._next = finished.end
                continue
            index, self._next = self._next, self._next + 1
            if index not in self._staged:
                return SampleTask(index, self.items[index])
        return None

    def is_ahead(self, cut: int) -> bool:
        """See `Feed.is_ahead`."""
        return self._next - cut > AHEAD

    def index_at(self, position: int) -> int:
        """See `Feed.index_at`."""
        return position

    def item_at(self, position: int) -> Item:
        """See `Feed.item_at`."""
        return self.items[position]

    def close(self) -> None:
        """See `Feed.close`."""
