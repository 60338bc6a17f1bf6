"""Kinetics-400, 600 and 700: an annotation csv, and videos in class folders, in one folder, or in CVDF's tar archives.

Columns are found by name (`label,youtube_id,time_start,time_end` and others). A video belongs to the rows whose id
its name begins with, in any folder: `ID_000010_000020.mp4` is the stretch of a film that a row means, `ID.mp4` the
film, which is cut for each of its rows. Files below a name with "replacement" in it take the place of others with the
same first 11 characters.
"""

from __future__ import annotations

import argparse
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from data_prep.compact import Chosen, Lookup
from data_prep.sources.base import Listing, check_present, find_archives, find_files, first_per_id, is_no_video
from data_prep.sources.csv_index import read_rows
from data_prep.sources.items import Item, Items
from data_prep.stretch import as_file, parse_stretch
from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.manifest import nfc

ID_LENGTH = 11  # of a YouTube id
_TIMES = re.compile(r"^(?P<id>.+)_(?P<start>\d{6})_(?P<end>\d{6})$")


@dataclass(frozen=True)
class KineticsSource:
    """Rows of a Kinetics csv. Fields are plain values."""

    annotations: str
    videos: str
    kind: ClassVar[str] = "kinetics"

    def listing(self) -> Listing:
        """See `Source.listing`."""
        items, numbers, notes = first_per_id(self._rows(), self.annotations)
        if not items:
            raise DataError(f"{self.annotations} has no rows")
        finder = _Finder(items, numbers)
        if archives := find_archives(self.videos):
            archives.sort(key=lambda url: "replacement" not in _tail(url))  # these first: the first one found counts
            return Listing(items, archives=[[url] for url in archives], find=finder.find, notes=notes)
        files = find_files(self.videos)
        items.locate(storage.absolute(self.videos), files)
        unlabelled = array("i")
        for replacements in (True, False):
            for number, file in enumerate(files):
                if ("replacement" in file) is replacements:
                    new = [row for row in finder.rows(file) if items.file(row.number) < 0]
                    for row in new:
                        items.place(row.number, number, row.is_file)
                    if not new:
                        unlabelled.append(number)
        check_present(items, self.annotations, self.videos)
        return Listing(items, Chosen(files, unlabelled), notes=notes)

    def _rows(self) -> Iterable[Item]:
        for line, row in read_rows(self.annotations, ["label", "youtube_id"]):
            youtube_id, label = row["youtube_id"].strip(), row["label"].strip()
            start, end = ((row.get(column) or "").strip() for column in ("time_start", "time_end"))
            if not youtube_id or not label:
                raise DataError(f"{self.annotations}: a row without id or label: {row}")
            try:
                stretch = parse_stretch(start, end) if start and end else None
            except ValueError as error:
                raise DataError(
                    f"{self.annotations}, line {line}: {youtube_id} has times {start!r} and {end!r}: {error}"
                ) from error
            times = f"_{int(stretch.start):06d}_{int(stretch.end):06d}" if stretch else ""
            yield Item(youtube_id + times, label, "", stretch)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """See `Source.add_arguments`."""
        parser.add_argument("--annotations", required=True, metavar="URL", help="csv with label and youtube_id")
        parser.add_argument(
            "--videos",
            required=True,
            metavar="URL",
            help="folder of videos or of tar archives, a "
            "pattern such as URL/part_*.tar.gz, or a .txt file with the URLs of the archives",
        )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> KineticsSource:
        """See `Source.from_arguments`."""
        return cls(storage.absolute(arguments.annotations), storage.absolute(arguments.videos))


def _tail(url: str) -> str:
    return url.rsplit("/", 1)[-1]


class _Row(NamedTuple):
    """The number of an item that a file belongs to; `is_file`: it holds what the row means alone."""

    number: int
    is_file: bool


class _Finder:
    """Finds the rows of a file name: the one with its id and times, else those with its id."""

    def __init__(self, items: Items, numbers: Lookup) -> None:
        self._items, self._numbers = items, numbers
        self._films = Lookup(self._film)  # the first row of each
        self._next = array("i", [-1]) * len(items)  # of the same film
        for number in reversed(range(len(items))):
            self._next[number] = self._films.put(self._film(number), number)

    def _film(self, number: int) -> str:
        return _split(nfc(self._items[number].name))[0]

    def find(self, path: str) -> list[Item]:
        """Return the items that a file belongs to: more than one where it is a film of which they mean stretches."""
        return [_of_stretch(self._items[row.number], row.is_file) for row in self.rows(path)]

    def rows(self, path: str) -> list[_Row]:
        """Return the rows that a file belongs to, none where it is no video."""
        if is_no_video(path):
            return []
        stem = nfc(_tail(path).rsplit(".", 1)[0])
        if (number := self._numbers.find(stem)) >= 0:
            return [_Row(number, True)]
        if "replacement" in path:
            numbers = self._of_film(stem[:ID_LENGTH])
            return [_Row(number, True) for number in numbers] if len(numbers) == 1 else []
        youtube_id, timed = _split(stem)
        found = self._of_film(youtube_id)  # where times follow, not another range of the same film
        return [_Row(number, False) for number in found if not timed or not self._items.stretch(number)]

    def _of_film(self, youtube_id: str) -> list[int]:
        found, number = [], self._films.find(youtube_id)
        while number >= 0:
            found.append(number)
            number = self._next[number]
        return found


def _of_stretch(item: Item, is_file: bool) -> Item:
    """Give the item as one whose file holds what it means alone, if it is that."""
    return replace(item, stretch=as_file(item.stretch)) if item.stretch and is_file else item


def _split(stem: str) -> tuple[str, bool]:
    """Return the id, and whether times follow it."""
    found = _TIMES.match(stem)
    return (found["id"], True) if found else (stem, False)
