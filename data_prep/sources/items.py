"""The videos of a source, by column: ten million of them take about as much memory as their ids and paths."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.compact import Indexed, TextList
from data_prep.stretch import Stretch


@dataclass(frozen=True, slots=True)
class Item:
    """One video that the source names. `url` is "" where the source names a video that is not there."""

    source_id: str  # unique within the source; a relative path or an id
    class_name: str
    url: str
    stretch: Stretch | None = None  # of a longer film; None: all of the video

    @property
    def name(self) -> str:
        """The file's name as the source writes it, without the times that `fragment` adds."""
        return self.source_id.rpartition("#t=")[0] if self.stretch and "#t=" in self.source_id else self.source_id


class Items(Indexed[Item]):
    """Items in a fixed order, each made when it is asked for.

    Args:
        base: the folder that `files` are relative to; "": they are URLs.
        files: the files that items can have, by number; an item without one has the number -1.
    """

    def __init__(self, base: str = "", files: Sequence[str] = ()) -> None:
        self.locate(base, files)
        self._ids = TextList()  # "" where the id is the path of the file
        self.class_names: list[str] = []  # by number, as they first came
        self._numbers_of_classes: dict[str, int] = {}
        self._class_numbers, self._file_numbers = array("i"), array("i")
        # Of stretches; empty as long as no item has one. NaN: none.
        self._starts, self._stops, self._are_files = array("d"), array("d"), bytearray()
        self._rows: NDArray[np.int32] | None = None

    @classmethod
    def of(cls, items: Iterable[Item]) -> Items:
        """Keep `items` by column."""
        files = TextList()
        kept = cls("", files)
        for item in items:
            if item.url:
                files.append(item.url)
            kept.append(item.source_id, item.class_name, len(files) - 1 if item.url else -1, item.stretch)
        return kept

    def locate(self, base: str, files: Sequence[str]) -> None:
        """Say what file numbers mean, before any item has one."""
        self._prefix = base.rstrip("/") + "/" if base else ""
        self.files = files

    def append(self, source_id: str, class_name: str, file: int = -1, stretch: Stretch | None = None) -> None:
        """Add an item at the end."""
        if stretch and not self._starts:
            self._starts, self._stops = (array("d", [math.nan]) * len(self) for _ in range(2))
            self._are_files = bytearray(len(self))
        if stretch or self._starts:
            self._starts.append(stretch.start if stretch else math.nan)
            self._stops.append(stretch.end if stretch else math.nan)
            self._are_files.append(stretch is not None and stretch.is_file)
        self._ids.append("" if file >= 0 and self.files[file] == source_id else source_id)
        number = self._numbers_of_classes.setdefault(class_name, len(self.class_names))
        if number == len(self.class_names):
            self.class_names.append(class_name)
        self._class_numbers.append(number)
        self._file_numbers.append(file)

    def place(self, index: int, file: int, is_file: bool) -> None:
        """Give an item its file; `is_file`: by its name, the file holds the item's stretch alone."""
        self._file_numbers[index] = file
        if is_file and self._starts:
            self._are_files[index] = True

    def reordered(self, rows: NDArray[np.integer[Any]]) -> Items:
        """Give the items at these indices; what they are kept in is shared."""
        view = Items.__new__(Items)
        vars(view).update(vars(self))
        view._rows = rows.astype(np.int32) if self._rows is None else self._rows[rows]
        return view

    def first_of_class(self, name: str) -> Item:
        """Give the item that was added first with this class name, spelled so."""
        return self._item(int(np.argmax(_view(self._class_numbers) == self._numbers_of_classes[name])))

    def present(self) -> NDArray[np.int64]:
        """Give the indices of the items that have a file."""
        files = _view(self._file_numbers)
        return np.flatnonzero((files if self._rows is None else files[self._rows]) >= 0)

    def present_classes(self) -> set[str]:
        """Give the distinct class names of the items that have a file."""
        numbers = np.unique(_view(self._class_numbers)[_view(self._file_numbers) >= 0])
        return {self.class_names[number] for number in numbers.tolist()}

    def count_cut(self) -> int:
        """Count the items that mean a stretch which their file does not hold alone."""
        return int(np.count_nonzero(~np.isnan(_view(self._starts)) & (_view(self._are_files) == 0)))

    def file(self, index: int) -> int:
        """Give the number of an item's file, -1 where it has none."""
        return self._file_numbers[self._row(index)]

    def source_id(self, index: int) -> str:
        """Give an item's id, without the rest of it."""
        return self._source_id(self._row(index))

    def class_name(self, index: int) -> str:
        """Give an item's class name, without the rest of it."""
        return self.class_names[self._class_numbers[self._row(index)]]

    def stretch(self, index: int) -> Stretch | None:
        """Give an item's stretch, without the rest of it."""
        return self._stretch(self._row(index))

    def __len__(self) -> int:
        return len(self._class_numbers) if self._rows is None else len(self._rows)

    def _at(self, index: int) -> Item:
        return self._item(self._row(index))

    def __iter__(self) -> Iterator[Item]:
        return map(self.__getitem__, range(len(self)))

    def _row(self, index: int) -> int:
        if index < 0:
            index = range(len(self))[index]
        return index if self._rows is None else self._rows.item(index)

    def _source_id(self, row: int) -> str:
        file = self._file_numbers[row]
        return self._ids[row] or (self.files[file] if file >= 0 else "")

    def _stretch(self, row: int) -> Stretch | None:
        if not self._starts or math.isnan(start := self._starts[row]):
            return None
        return Stretch(start, self._stops[row], bool(self._are_files[row]))

    def _item(self, row: int) -> Item:
        file = self._file_numbers[row]
        url = self._prefix + self.files[file] if file >= 0 else ""
        return Item(self._source_id(row), self.class_names[self._class_numbers[row]], url, self._stretch(row))


def _view(column: array[Any] | bytearray) -> NDArray[Any]:
    """Look at a column as numbers; it must not grow as long as the view is there."""
    return np.frombuffer(column, column.typecode if isinstance(column, array) else np.uint8) if column else np.empty(0)
