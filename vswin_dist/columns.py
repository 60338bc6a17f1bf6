"""Rows of one dataclass kept by column: ten million of them are a few arrays, which processes can share, and no object.

A column is a NumPy array, or `Texts`; a row is made when it is asked for. The dataclass's types say how a column is
kept: `int` in 64 bits, `Int32` and `UInt32` in 32, `float` in 64, `str` as UTF-8.
"""

from __future__ import annotations

import mmap
import tempfile
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import IO, Annotated, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Int32 = Annotated[int, "<i4"]
UInt32 = Annotated[int, "<u4"]
BLOCK = 1 << 16  # rows that are handled together
IN_MEMORY = 64 << 20  # bytes of a column in the making; more of them lie in a file of the temporary folder
ENDS = ".ends"


class Texts:
    """A column of texts: their UTF-8 bytes one after another, and where in these each one ends."""

    def __init__(self, ends: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self.ends, self.data = ends, data

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Make a column of `texts`."""
        parts = [text.encode() for text in texts]
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)))
        return cls(ends, np.frombuffer(b"".join(parts), np.uint8))

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, index: int) -> str:
        """Give the text at `index`."""
        end = self.ends.item(index)  # which refuses an index that there is not
        return self.data[self.ends.item(index - 1) if index else 0 : end].tobytes().decode()

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Texts:
        if isinstance(rows, slice) and (rows.step or 1) == 1:
            first, last, _ = rows.indices(len(self))
            start = self.ends.item(first - 1) if first else 0
            ends = self.ends[first:last] - start
            return Texts(ends, self.data[start : start + (ends.item(-1) if len(ends) else 0)])
        return Texts.of(map(self.item, range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()))

    def tolist(self) -> list[str]:
        """Give all of them."""
        data, found, start = self.data.tobytes(), [], 0
        for end in self.ends.tolist():
            found.append(data[start:end].decode())
            start = end
        return found


Column = NDArray[Any] | Texts
Block = Mapping[str, Column]


def kinds(cls: type[Any]) -> dict[str, np.dtype[Any] | None]:
    """Tell how each column of the dataclass `cls` is kept: the array's type; None: as texts."""
    known: dict[Any, str | None] = {int: "<i8", float: "<f8", str: None}
    found = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        kind = hint.__metadata__[0] if typing.get_origin(hint) is Annotated else known[hint]
        found[name] = None if kind is None else np.dtype(kind)
    return found


class Table(Sequence[T]):
    """Rows of the dataclass `cls`, read-only.

    Args:
        columns: by the names of its fields, equally long.
        rows: the indices of those that count, in their order; None: all.
        origin: a function and its arguments that give the table of all rows in another process, which is then what is
            pickled; None: the columns are.
    """

    def __init__(
        self,
        cls: type[T],
        columns: Block,
        rows: NDArray[np.int64] | None = None,
        origin: tuple[Callable[..., Table[T]], tuple[Any, ...]] | None = None,
    ) -> None:
        self.cls, self._columns, self._rows, self._origin = cls, columns, rows, origin
        self._length = len(next(iter(columns.values()))) if rows is None else len(rows)

    @classmethod
    def of(cls, kind: type[T], rows: Iterable[T]) -> Table[T]:
        """Make a table of `rows`."""
        builder = Builder(kind)
        builder.extend(rows)
        return builder.table()

    def column(self, name: str) -> Column:
        """Give a whole column; a view where all rows count."""
        column = self._columns[name]
        return column if self._rows is None else column[self._rows]

    def numbers(self, name: str) -> NDArray[Any]:
        """Give a whole column of numbers."""
        column = self.column(name)
        assert isinstance(column, np.ndarray), f"{name} is a column of texts"
        return column

    def counts(self, name: str) -> Counter[Any]:
        """Count the rows of each value of a column."""
        found: Counter[Any] = Counter()
        for block in self.blocks():
            found.update(block[name].tolist())
        return found

    def value(self, name: str, index: int) -> Any:
        """Give one value, without the others of its row."""
        return self._columns[name].item(self._row(index))

    def row(self, index: int) -> T:
        """Give a row that reads its values when they are asked for: a process then maps no page of the other columns."""
        return typing.cast(T, _Row(self, index))

    def blocks(self) -> Iterator[dict[str, Any]]:
        """Give all rows, by column, a bounded number at a time; of files that are mapped, no more stays in memory."""
        for start in range(0, len(self), BLOCK):
            rows = slice(start, min(start + BLOCK, len(self))) if self._rows is None else self._rows[start : start + BLOCK]
            yield {name: column[rows] for name, column in self._columns.items()}
            for column in self._columns.values():
                for array in (column.ends, column.data) if isinstance(column, Texts) else (column,):
                    _forget_pages(array)

    def __len__(self) -> int:
        return self._length

    @typing.overload
    def __getitem__(self, index: int) -> T: ...

    @typing.overload
    def __getitem__(self, index: slice | NDArray[np.int64]) -> Table[T]: ...

    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> T | Table[T]:
        if isinstance(index, (slice, np.ndarray)):
            rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else index
            return Table(self.cls, self._columns, rows if self._rows is None else self._rows[rows], self._origin)
        row = self._row(index)
        return self.cls(*[column.item(row) for column in self._columns.values()])

    def __iter__(self) -> Iterator[T]:
        for block in self.blocks():
            yield from map(self.cls, *(column.tolist() for column in block.values()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} rows of {self.cls.__name__}>"

    def __reduce__(self) -> Any:
        if self._origin is None:
            return Table, (self.cls, {n: c[:] for n, c in self._columns.items()}, self._rows)
        return _chosen, (self._origin, self._rows)

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index = index % len(self)
        return index if self._rows is None else self._rows.item(index)


class _Row:
    """What `Table.row` gives."""

    __slots__ = ("_index", "_table")

    def __init__(self, table: Table[Any], index: int) -> None:
        self._table, self._index = table, index

    def __getattr__(self, name: str) -> Any:
        return self._table.value(name, self._index)


def _chosen(origin: tuple[Callable[..., Table[T]], tuple[Any, ...]], rows: NDArray[np.int64] | None) -> Table[T]:
    function, arguments = origin
    table = function(*arguments)
    return table if rows is None else table[rows]


class Builder(Generic[T]):
    """Makes a table of rows that come a few at a time, in no more memory than `IN_MEMORY` for each column."""

    def __init__(self, cls: type[T]) -> None:
        self.cls, self.kinds = cls, kinds(cls)
        self._made: dict[str, _Column] = {}
        for name, kind in self.kinds.items():
            self._made[name] = _Column(np.dtype("u1") if kind is None else kind)
            if kind is None:
                self._made[name + ENDS] = _Column(np.dtype("<i8"))
        self._ends = dict.fromkeys(self.kinds, 0)

    def add(self, block: Block) -> None:
        """Append the rows of `block`.

        Raises:
            ValueError: a column is missing, is longer than another, or does not hold what it should.
        """
        if missing := [name for name in self.kinds if name not in block]:
            raise ValueError(f"{missing[0]} is missing")
        if len({len(block[name]) for name in self.kinds}) > 1:
            raise ValueError("its columns differ in length")
        for name, kind in self.kinds.items():
            column = block[name]
            if isinstance(column, Texts) != (kind is None):
                raise ValueError(f"column {name} holds {'texts' if kind else 'numbers'}")
            if isinstance(column, Texts):
                self._made[name + ENDS].write(column.ends + self._ends[name])
                self._made[name].write(column.data)
                self._ends[name] += len(column.data)
            else:
                self._made[name].write(column.astype(kind, casting="safe", copy=False))

    def extend(self, rows: Iterable[T]) -> None:
        """Append `rows`."""
        rest = iter(rows)
        while some := list(islice(rest, BLOCK)):
            self.add(block_of(self.cls, {f.name: [getattr(row, f.name) for row in some] for f in fields(self.cls)}))  # type: ignore[arg-type]

    def table(self) -> Table[T]:
        """Give the table of what was appended; the builder is then of no more use."""
        return table_of(self.cls, {name: column.array() for name, column in self._made.items()})


class _Column:
    """A column in the making: its bytes, which lie in a temporary file once they are more than `IN_MEMORY`."""

    def __init__(self, kind: np.dtype[Any]) -> None:
        self._kind, self._bytes = kind, bytearray()
        self._file: IO[bytes] | None = None

    def write(self, array: NDArray[Any]) -> None:
        self._bytes += np.ascontiguousarray(array).view(np.uint8).data
        if len(self._bytes) > IN_MEMORY or self._file:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - until `array`
            self._file.write(self._bytes)
            self._bytes = bytearray()

    def array(self) -> NDArray[Any]:
        if self._file is None:
            return np.frombuffer(self._bytes, self._kind)
        with self._file as file:
            file.flush()
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), self._kind)


def _forget_pages(array: NDArray[Any]) -> None:
    """Let the pages of an array that is a mapped file go; they come back when they are asked for."""
    base: Any = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def block_of(cls: type[Any], lists: Mapping[str, list[Any]]) -> dict[str, Column]:
    """Make a block of plain lists.

    Raises:
        ValueError: one holds what its column cannot.
    """
    block: dict[str, Column] = {}
    for name, kind in kinds(cls).items():
        values = lists[name]
        try:
            column: Column = Texts.of(values) if kind is None else np.array(values, kind)
            if isinstance(column, np.ndarray) and column.tolist() != values:
                wrong = next(v for v, kept in zip(values, column.tolist(), strict=True) if v != kept)
                raise ValueError(f"{wrong!r} cannot be kept as {kind}")
            block[name] = column
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"column {name}: {error}") from error
    return block


def arrays_of(table: Table[Any], prefix: str = "") -> dict[str, NDArray[Any]]:
    """Give the arrays that make up `table`; `table_of` makes it again."""
    found: dict[str, NDArray[Any]] = {}
    for name in kinds(table.cls):
        column = table.column(name)
        if isinstance(column, Texts):
            found |= {prefix + name: column.data, prefix + name + ENDS: column.ends}
        else:
            found[prefix + name] = column
    return found


def table_of(
    cls: type[T],
    arrays: Mapping[str, NDArray[Any]],
    prefix: str = "",
    origin: tuple[Callable[..., Table[T]], tuple[Any, ...]] | None = None,
) -> Table[T]:
    """Make the table that `arrays_of` took apart."""
    columns: dict[str, Column] = {
        name: Texts(arrays[prefix + name + ENDS], arrays[prefix + name]) if kind is None else arrays[prefix + name]
        for name, kind in kinds(cls).items()
    }
    return Table(cls, columns, origin=origin)
