"""A plain list as the field's other tools use it: ``path label_id`` on every line, space separated, no header."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import ClassVar

from data_prep.sources.base import Listing, read_classes, read_text
from data_prep.sources.csv_index import list_rows
from vswin_dist import storage
from vswin_dist.errors import DataError


@dataclass(frozen=True)
class ListSource:
    """Lines of a list; `names` are the class names by id, empty where the ids themselves are to be the names."""

    index: str
    videos: str
    names: list[str]
    kind: ClassVar[str] = "list"

    def listing(self) -> Listing:
        """See `Source.listing`."""
        rows: list[tuple[str, int]] = []
        for number, line in enumerate(read_text(self.index, "list").splitlines(), 1):
            if line.strip():
                path, _, label = line.strip().rpartition(" ")
                if not path or not label.isdecimal():
                    raise DataError(f"{self.index}, line {number}: {line.strip()!r} is not 'path label_id'")
                rows.append((path.strip(), int(label)))
        if not rows:
            raise DataError(f"{self.index} has no lines")
        names = self.names or [str(i) for i in range(max(label for _, label in rows) + 1)]
        if out := [(path, label) for path, label in rows if label >= len(names)]:
            raise DataError(f"{self.index}: {out[0][0]!r} has class id {out[0][1]}, --classes gives {len(names)} names")
        named = {path for path, _ in rows}
        listing = list_rows([(path, names[label]) for path, label in rows], self.videos, named, self.index)
        return replace(listing, classes=names)

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
