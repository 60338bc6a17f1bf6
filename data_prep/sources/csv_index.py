"""A csv file with a header: one column names the video file, one its class; rows can be chosen by value."""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from data_prep.compact import TextList
from data_prep.sources.base import Listing, read_lines
from data_prep.sources.rows import Row, Videos, list_rows
from data_prep.stretch import Stretch, parse_stretch
from vswin_dist import storage
from vswin_dist.errors import ConfigError, DataError, nearest
from vswin_dist.manifest import nfc

TIMES = (("start", "end"), ("time_start", "time_end"), ("start_time", "end_time"))


def read_rows(url: str, columns: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read the rows of the csv file at `url`, each with its line's number, after checking that `columns` are there.

    Columns are named in the composed form (see `nfc`).

    Raises:
        DataError: unreadable, without a header, a column is missing or a row is too short.
    """
    reader = csv.DictReader(read_lines(url, "index"))
    try:
        reader.fieldnames = header = [nfc(name) for name in reader.fieldnames or []]
        for column in columns:
            if column not in header:
                raise DataError(
                    f"{url} has no column {column!r}; it has {', '.join(header) or 'no header'}.{nearest(column, header)}"
                )
        for row in reader:
            if any(row[column] is None for column in columns):
                raise DataError(f"{url}, line {reader.line_num}: fewer values than columns")
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{url}, line {reader.line_num}: {error}") from error


def parse_where(conditions: list[str]) -> dict[str, list[str]]:
    """Parse `["subject=1,3", "view=front"]` into values by column.

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
    start_column: str | None = None  # of the stretch that a row means; None: where both are there by a usual name, "": none
    end_column: str | None = None
    kind: ClassVar[str] = "csv"

    def listing(self) -> Listing:
        """See `Source.listing`."""
        others = TextList()  # paths of rows that are not chosen
        rows = self._chosen(others)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{self.index} has no rows" + (f" with {self.where}" if self.where else ""))
        listing = list_rows((row for row, _ in itertools.chain([first], rows)), Videos(self.videos), self.index, others)
        cut, times = listing.items.count_cut(), first[1]
        if cut and self.start_column is None and self.end_column is None:
            listing.notes.append(
                f"{self.index}: {cut:,} rows mean a stretch, by the columns {' and '.join(times)}; "
                '--start-column "" takes the files as they are'
            )
        return listing

    def _chosen(self, others: TextList) -> Iterator[tuple[Row, tuple[str, str]]]:
        """Give the rows that are chosen, with the columns of their times; the paths of the others go to `others`."""
        path_column, label_column = nfc(self.path_column), nfc(self.label_column)
        where = {nfc(column): {nfc(value) for value in values} for column, values in self.where.items()}
        columns = [path_column, label_column, *where, *(nfc(c) for c in (self.start_column, self.end_column) if c)]
        times: tuple[str, str] | None = None
        for line, row in read_rows(self.index, columns):
            times = times or self._time_columns(row)
            path = row[path_column].strip()
            if all(nfc(row[column].strip()) in values for column, values in where.items()):
                yield Row(path, row[label_column].strip(), line, self._stretch(row, times, line)), times
            else:
                others.append(path)

    def _time_columns(self, row: dict[str, str]) -> tuple[str, str]:
        """Name the columns of start and end, "" for one that there is not."""
        if self.start_column is not None or self.end_column is not None:
            return nfc(self.start_column or ""), nfc(self.end_column or "")
        return next((pair for pair in TIMES if all(row.get(column) is not None for column in pair)), ("", ""))

    def _stretch(self, row: dict[str, str], times: tuple[str, str], line: int) -> Stretch | None:
        start, end = (row[column].strip() if column else "" for column in times)
        try:
            return parse_stretch(start, end)
        except ValueError as error:
            raise DataError(f"{self.index}, line {line}: {times[0]} {start!r}, {times[1]} {end!r}: {error}") from error

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """See `Source.add_arguments`."""
        parser.add_argument("--index", required=True, metavar="URL", help="csv file with a header")
        parser.add_argument("--videos", required=True, metavar="URL", help="folder that the paths are relative to")
        parser.add_argument("--path-column", default="path", metavar="NAME", help="column of the path (%(default)s)")
        parser.add_argument("--label-column", default="label", metavar="NAME", help="column of the class (%(default)s)")
        parser.add_argument(
            "--where",
            action="append",
            default=[],
            metavar="COLUMN=VALUE[,VALUE]",
            help="take only the rows with these values; can be given several times",
        )
        parser.add_argument(
            "--start-column",
            metavar="NAME",
            help="column of the time, seconds or hh:mm:ss, at which what a row means begins in a longer film (start, "
            'time_start or start_time, where its end stands beside it); "" takes the files as they are',
        )
        parser.add_argument("--end-column", metavar="NAME", help="column of its end (end, time_end or end_time)")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> CsvSource:
        """See `Source.from_arguments`."""
        return cls(
            storage.absolute(arguments.index),
            storage.absolute(arguments.videos),
            arguments.path_column,
            arguments.label_column,
            parse_where(arguments.where),
            arguments.start_column,
            arguments.end_column,
        )
