"""A csv file with a header: one column names the video file, one its class; rows can be chosen by value."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from data_prep.sources.base import Item, Listing, find_files, first_per_id, read_text
from vswin_dist import storage
from vswin_dist.errors import ConfigError, DataError, nearest


def read_rows(url: str, columns: list[str]) -> Iterator[dict[str, str]]:
    """The rows of the csv file at `url` as dicts, after checking that `columns` are there.

    Raises:
        DataError: unreadable, without a header, a column is missing or a row is too short.
    """
    reader = csv.DictReader(io.StringIO(read_text(url, "index")))
    try:
        header = reader.fieldnames or []
        for column in columns:
            if column not in header:
                raise DataError(f"{url} has no column {column!r}; it has {', '.join(header) or 'no header'}."
                                f"{nearest(column, header)}")
        for row in reader:
            if any(row[column] is None for column in columns):
                raise DataError(f"{url}, line {reader.line_num}: fewer values than columns")
            yield row
    except csv.Error as error:
        raise DataError(f"{url}, line {reader.line_num}: {error}") from error


def parse_where(conditions: list[str]) -> dict[str, list[str]]:
    """``["subject=1,3", "view=front"]`` as column -> values.

    Raises:
        ConfigError: a condition is not COLUMN=VALUE[,VALUE].
    """
    parsed: dict[str, list[str]] = {}
    for condition in conditions:
        column, equals, values = condition.partition("=")
        if not equals or not column or not values:
            raise ConfigError(f"--where {condition!r}: write COLUMN=VALUE or COLUMN=VALUE,VALUE")
        parsed.setdefault(column, []).extend(v.strip() for v in values.split(","))
    return parsed


@dataclass(frozen=True)
class CsvSource:
    """Rows of a csv file; the file named by a row lies below `videos`. Fields are plain values."""

    index: str
    videos: str
    path_column: str
    label_column: str
    where: dict[str, list[str]]
    kind: ClassVar[str] = "csv"

    def listing(self) -> Listing:
        """See `Source.listing`."""
        rows = read_rows(self.index, [self.path_column, self.label_column, *self.where])
        all_rows = list(rows)
        chosen = [(row[self.path_column].strip(), row[self.label_column].strip()) for row in all_rows
                  if all(row[column].strip() in values for column, values in self.where.items())]
        if not chosen:
            raise DataError(f"{self.index} has no rows" + (f" with {self.where}" if self.where else ""))
        named = {row[self.path_column].strip() for row in all_rows}
        return list_rows(chosen, self.videos, named, self.index)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """See `Source.add_arguments`."""
        parser.add_argument("--index", required=True, metavar="URL", help="csv file with a header")
        parser.add_argument("--videos", required=True, metavar="URL", help="folder that the paths are relative to")
        parser.add_argument("--path-column", default="path", metavar="NAME", help="column of the path (%(default)s)")
        parser.add_argument("--label-column", default="label", metavar="NAME", help="column of the class (%(default)s)")
        parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE[,VALUE]",
                            help="take only the rows with these values; can be given several times")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> CsvSource:
        """See `Source.from_arguments`."""
        return cls(storage.absolute(arguments.index), storage.absolute(arguments.videos), arguments.path_column,
                   arguments.label_column, parse_where(arguments.where))


def list_rows(rows: list[tuple[str, str]], videos: str, named: set[str], index: str) -> Listing:
    """Items of (relative path, class) rows, against what lies below `videos`.

    A row whose file is absent becomes an item without URL. `named` are all paths that the index names, chosen or
    not: other files below `videos` have no row.

    Raises:
        DataError: a row without a path or a class, a path that leaves the folder, or not one file is there.
    """
    files = find_files(videos)
    present = set(files)
    base = storage.absolute(videos)
    items = []
    for path, label in rows:
        if not path or not label:
            raise DataError(f"{index}: a row without {'a path' if not path else f'a class (path {path!r})'}")
        if path.startswith("/") or "://" in path or ".." in path.split("/"):
            raise DataError(f"{index}: path {path!r} leaves the video folder; paths must be relative to {videos}")
        items.append(Item(path, label, storage.join(base, path) if path in present else ""))
    if not any(item.url for item in items):
        raise DataError(f"none of the {len(items)} files of {index} is below {videos}, for instance "
                        f"{items[0].source_id!r}; there lie for instance {files[0]!r}")
    kept, again = first_per_id(items)
    if again:
        raise DataError(f"{index} names {len(again)} paths twice, for instance {again[0]!r}")
    return Listing(kept, [f for f in files if f not in named and f.rsplit("/", 1)[-1] != index.rsplit("/", 1)[-1]])
