"""Kinetics-400, 600 and 700: an annotation csv, and videos in class folders, in one folder, or in CVDF's tar archives.

Columns are found by name (``label,youtube_id,time_start,time_end`` and others). A video belongs to the row whose id
its name begins with: ``ID_000010_000020.mp4`` or ``ID.mp4``, in any folder. Files below a name with "replacement" in
it take the place of others with the same first 11 characters.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from data_prep.sources.base import Item, Listing, find_archives, find_files, first_per_id
from data_prep.sources.csv_index import read_rows
from vswin_dist import storage
from vswin_dist.errors import DataError

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
        rows, again = first_per_id(self._rows())
        if not rows:
            raise DataError(f"{self.annotations} has no rows")
        finder = _Finder(rows)
        if archives := find_archives(self.videos):
            archives.sort(key=lambda url: "replacement" not in _tail(url))  # these first: the first one found counts
            return Listing(rows, again, archives=[[url] for url in archives], find=finder.find)
        files = sorted(find_files(self.videos), key=lambda f: "replacement" not in f)
        base = storage.absolute(self.videos)
        taken: dict[str, str] = {}
        unnamed = again
        for file in files:
            row = finder.find(file)
            if row is None or taken.setdefault(row.source_id, file) != file:
                unnamed.append(file)
        items = [replace(row, url=storage.join(base, taken[row.source_id]) if row.source_id in taken else "")
                 for row in rows]
        return Listing(items, unnamed)

    def _rows(self) -> Iterable[Item]:
        for row in read_rows(self.annotations, ["label", "youtube_id"]):
            youtube_id, label = row["youtube_id"].strip(), row["label"].strip()
            start, end = (row.get(column) or "" for column in ("time_start", "time_end"))
            if not youtube_id or not label:
                raise DataError(f"{self.annotations}: a row without id or label: {row}")
            try:
                times = f"_{int(float(start)):06d}_{int(float(end)):06d}" if start and end else ""
            except ValueError as error:
                raise DataError(f"{self.annotations}: {youtube_id}: times {start!r}, {end!r} are no numbers") from error
            yield Item(youtube_id + times, label, "")

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """See `Source.add_arguments`."""
        parser.add_argument("--annotations", required=True, metavar="URL", help="csv with label and youtube_id")
        parser.add_argument("--videos", required=True, metavar="URL", help="folder of videos or of tar archives, a "
                            "pattern such as URL/part_*.tar.gz, or a .txt file with the URLs of the archives")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> KineticsSource:
        """See `Source.from_arguments`."""
        return cls(storage.absolute(arguments.annotations), storage.absolute(arguments.videos))


def _tail(url: str) -> str:
    return url.rsplit("/", 1)[-1]


class _Finder:
    """Finds the row of a file name: by id and times, else by the id where only one row has it."""

    def __init__(self, rows: list[Item]) -> None:
        self.exact = {row.source_id: row for row in rows}
        self.by_id: dict[str, Item | None] = {}
        for row in rows:
            youtube_id = _split(row.source_id)[0]
            self.by_id[youtube_id] = None if youtube_id in self.by_id else row

    def find(self, path: str) -> Item | None:
        """The row that a file belongs to, None where there is none or where more than one could be meant."""
        stem = _tail(path).rsplit(".", 1)[0]
        if stem in self.exact:
            return self.exact[stem]
        if "replacement" in path:
            return self.by_id.get(stem[:ID_LENGTH])
        youtube_id, timed = _split(stem)
        row = self.by_id.get(youtube_id)
        if row is not None and timed and _split(row.source_id)[1]:
            return None  # another stretch of the same film
        return row


def _split(stem: str) -> tuple[str, bool]:
    """The id, and whether times follow it."""
    found = _TIMES.match(stem)
    return (found["id"], True) if found else (stem, False)
