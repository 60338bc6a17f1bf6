"""Rows that name a video by its path: how the paths of an index and the files below a folder find each other.

Paths are taken as other tools write them: absolute below the folder, with `./` and `//`, with backslashes, in composed
or decomposed letters.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.compact import Chosen, Lookup, TextList
from data_prep.sources.base import Listing, check_present, find_files, fragment, some
from data_prep.sources.items import Items
from data_prep.stretch import Stretch, as_file, name_holds
from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.manifest import nfc


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an index: a path, a class, the line where they stand, and the part of the video that it means."""

    path: str
    label: str
    line: int = 0
    stretch: Stretch | None = None


class Videos:
    """The files below the folder `url`, found by the paths of an index."""

    def __init__(self, url: str) -> None:
        """List the files.

        Raises:
            DataError: there is no such folder, or it holds no file.
        """
        self.url = url
        self.base = storage.absolute(url)
        self.files = find_files(url)
        self._numbers = Lookup(self.files.__getitem__)
        self._forms = Lookup(lambda number: nfc(self.files[number]))  # of names beyond ASCII
        for number, file in enumerate(self.files):
            self._numbers.add(file, number)
            if not file.isascii():
                self._forms.put(nfc(file), number)

    def find(self, path: str) -> int:
        """Give the number among `files` of the one that the relative `path` means, -1 where it is not there."""
        number = self._numbers.find(path)
        if number >= 0 or path.isascii():
            return number
        number = self._numbers.find(form := nfc(path))
        return number if number >= 0 else self._forms.find(form)

    def relative(self, path: str, where: str) -> str:
        """Write `path` relative to the folder, without what changes nothing.

        Raises:
            DataError: it leaves the folder; `where` says which row has it.
        """
        if "\\" in path and self.find(path) < 0:
            path = path.replace("\\", "/")
        if path.startswith("/") or "://" in path:
            path = self._below(path, where)
        if "./" in path or "//" in path or path.startswith("."):
            path = "/".join(part for part in path.split("/") if part not in ("", "."))
        if ".." in path.split("/"):
            raise self._leaves(path, where)
        return path

    def _below(self, path: str, where: str) -> str:
        """Cut the folder off an absolute path; a local one may reach the folder through links."""
        found, base = storage.absolute(path), self.base
        if storage.is_local(path) and storage.is_local(base) and not nfc(found).startswith(f"{nfc(base)}/"):
            found, base = os.path.realpath(found), os.path.realpath(base)
        if not nfc(found).startswith(f"{nfc(base).rstrip('/')}/"):
            raise self._leaves(path, where)
        return nfc(found)[len(nfc(base).rstrip("/")) + 1 :]

    def _leaves(self, path: str, where: str) -> DataError:
        return DataError(f"{where}: path {path!r} leaves the video folder; paths must lie below {self.url}")


def list_rows(rows: Iterable[Row], videos: Videos, index: str, named: Iterable[str] = ()) -> Listing:
    """Make items of the `rows` of `index`. A row whose file is absent becomes an item without URL.

    A row that stands twice is one item, which the notes say. `named` are paths of rows that were not chosen, looked at after
    `rows`: files that no path names are unlabelled.

    Raises:
        DataError: a row without a path or a class, a path that leaves the folder, one video with two classes, or not
            one file is there.
    """
    items = Items(videos.base, videos.files)
    numbers = Lookup(lambda number: _key(items, number))  # by what tells one video from another
    taken = bytearray(len(videos.files))
    repeated = TextList()
    for row in rows:
        where = f"{index}, line {row.line}" if row.line else index
        if not row.path or not row.label:
            raise DataError(f"{where}: a row without {'a path' if not row.path else f'a class (path {row.path!r})'}")
        name = path = videos.relative(row.path, where)
        file, stretch = videos.find(path), row.stretch
        key = videos.files[file] if file >= 0 else nfc(path)
        if stretch and name_holds(path.rpartition(".")[0], stretch):
            stretch = as_file(stretch)
        elif stretch:
            name, key = fragment(path, stretch), fragment(key, stretch)
        first = numbers.add(key, len(items))
        if first == len(items):
            items.append(name, row.label, file, stretch)
        elif nfc(items.class_name(first)) == nfc(row.label):
            repeated.append(name)
        else:
            raise DataError(f"{where}: {name!r} has class {row.label!r}, in an earlier row {items.class_name(first)!r}")
        if file >= 0:
            taken[file] = True
    check_present(items, index, videos.url)
    for path in named:
        with contextlib.suppress(DataError):  # it was not asked for
            if (file := videos.find(videos.relative(path, index))) >= 0:
                taken[file] = True
    notes = [f"{index}: {len(repeated):,} rows stand twice and are kept once: {some(repeated)}"] if repeated else []
    return Listing(items, _untaken(videos.files, taken, index.rsplit("/", 1)[-1]), notes=notes)


def _key(items: Items, number: int) -> str:
    """Give what tells an item of `list_rows` from others: its file and its stretch."""
    item, file = items[number], items.file(number)
    is_file = item.stretch is None or item.stretch.is_file
    key = items.files[file] if file >= 0 else nfc(item.source_id if is_file else item.name)
    return key if is_file or not item.stretch else fragment(key, item.stretch)


def _untaken(files: Sequence[str], taken: bytearray, but: str) -> Chosen:
    """Choose the files that are not taken and not called `but`."""
    numbers = array("i")
    for number in np.flatnonzero(np.frombuffer(taken, np.uint8) == 0).tolist():
        if files[number].rsplit("/", 1)[-1] != but:
            numbers.append(number)
    return Chosen(files, numbers)
