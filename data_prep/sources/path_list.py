"""A plain list as the field's other tools use it, no header: `path label_id` or `path frames label_id` on every line.

What stands between them may be spaces, tabs or commas. The count of frames, which older lists give, is not used.
"""

from __future__ import annotations

import argparse
import itertools
import re
from array import array
from dataclasses import dataclass, replace
from typing import ClassVar

from data_prep.compact import TextList
from data_prep.sources.base import Listing, read_classes, read_lines
from data_prep.sources.rows import Row, Videos, list_rows
from vswin_dist import storage
from vswin_dist.errors import DataError

_LINE = re.compile(r"(?P<path>.*[^\s,;])[\s,;]+(?P<number>\d{1,18})")
_EXTENSION = re.compile(r"\.\w{2,4}$")


@dataclass(frozen=True)
class ListSource:
    """Lines of a list; `names` are the class names by id, empty where the ids themselves are to be the names."""

    index: str
    videos: str
    names: list[str]
    kind: ClassVar[str] = "list"

    def listing(self) -> Listing:
        """See `Source.listing`."""
        videos = Videos(self.videos)
        paths, ids, numbers = TextList(), array("q"), array("q")  # of every row, numbers those of their lines
        counts = 0  # lines with a count of frames
        lines = itertools.chain.from_iterable(map(str.splitlines, read_lines(self.index, "list")))
        for number, line in enumerate(lines, 1):
            if line.strip():
                path, class_id, has_count = self._parse(line.strip(), number, videos)
                paths.append(path)
                ids.append(class_id)
                numbers.append(number)
                counts += has_count
        if not paths:
            raise DataError(f"{self.index} has no lines")
        names = self._names(paths, ids, numbers)
        rows = (Row(path, names[i], line) for path, i, line in zip(paths, ids, numbers, strict=True))
        listing = list_rows(rows, videos, self.index)
        if counts:
            listing.notes.append(f"{self.index}: {counts:,} lines give a count of frames, which is not used")
        if not self.names and (least := min(ids)):
            listing.notes.append(f"{self.index}: the class ids begin at {least}; the first class has id 0")
        return replace(listing, classes=names)

    def _parse(self, line: str, number: int, videos: Videos) -> tuple[str, int, bool]:
        """Return path and class id, and whether a count of frames stands between them."""
        found = _LINE.fullmatch(line)
        if not found:
            raise DataError(f"{self.index}, line {number}: {line!r} is not 'path label_id' or 'path frames label_id'")
        path, class_id = _unquoted(found["path"]), int(found["number"])
        shorter = _LINE.fullmatch(path)
        if not shorter or _EXTENSION.search(path) or videos.find(path) >= 0:
            return path, class_id, False
        rest = _unquoted(shorter["path"])
        if _EXTENSION.search(rest) or videos.find(rest) >= 0:
            return rest, class_id, True
        if (more := _LINE.fullmatch(rest)) and (_EXTENSION.search(more["path"]) or videos.find(more["path"]) >= 0):
            raise DataError(
                f"{self.index}, line {number}: {line!r} has more than one number between path and label_id; "
                "parts of videos are taken from a csv file with columns start and end, in seconds"
            )
        return path, class_id, False

    def _names(self, paths: TextList, ids: array[int], lines: array[int]) -> list[str]:
        """Give the class names by id, after checking that every id has one.

        Raises:
            DataError: an id has none, or there are more ids than rows: one of them is a mistake.
        """
        largest = max(ids)
        row = ids.index(largest)
        path, line = paths[row], lines[row]
        if self.names and largest >= len(self.names):
            raise DataError(
                f"{self.index}, line {line}: {path!r} has class id {largest}, --classes gives {len(self.names)} names, "
                "the first of which has id 0"
            )
        if not self.names and largest >= len(ids):
            raise DataError(
                f"{self.index}, line {line}: {path!r} has class id {largest}, which makes {largest + 1:,} classes of "
                f"{len(ids):,} rows; correct it, or give the names of all classes with --classes"
            )
        return self.names or [str(i) for i in range(largest + 1)]

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """See `Source.add_arguments`."""
        parser.add_argument("--index", required=True, metavar="URL", help="the list")
        parser.add_argument("--videos", required=True, metavar="URL", help="folder that the paths are relative to")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ListSource:
        """See `Source.from_arguments`."""
        names = read_classes(arguments.classes) if arguments.classes else []
        return cls(storage.absolute(arguments.index), storage.absolute(arguments.videos), names)


def _unquoted(path: str) -> str:
    return path[1:-1].replace('""', '"').strip() if len(path) > 2 and path[0] == path[-1] == '"' else path
