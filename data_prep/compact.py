"""Texts and what is found by them in little memory: ten million of them are a few blocks of bytes, and no object each."""

from __future__ import annotations

import itertools
import typing
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

T = typing.TypeVar("T")
BLOCK = 1 << 16  # texts that are made at once
FULL = 2 / 3  # of a lookup's slots, from where it is made twice as large


class Indexed(Sequence[T]):
    """A sequence of what `_at` makes for an index from 0 on; part of it is a list."""

    @abstractmethod
    def _at(self, index: int) -> T: ...

    @typing.overload
    def __getitem__(self, index: int) -> T: ...

    @typing.overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(len(self))[index]]
        return self._at(range(len(self))[index])


class TextList(Indexed[str]):
    """A list of texts, kept as UTF-8 with eight bytes each beside it; a `str` is made when it is asked for."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._data, self._bounds = bytearray(), array("q", [0])  # each ends where the next one starts
        self.extend(texts)

    def append(self, text: str) -> None:
        """Add `text` at the end."""
        self._data += text.encode()
        self._bounds.append(len(self._data))

    def extend(self, texts: Iterable[str]) -> None:
        """Add `texts` at the end."""
        for text in texts:
            self.append(text)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def _at(self, index: int) -> str:
        return self._data[self._bounds[index] : self._bounds[index + 1]].decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), BLOCK):
            bounds = self._bounds[first : first + BLOCK + 1]
            data, start = bytes(self._data[bounds[0] : bounds[-1]]), bounds[0]
            for begin, end in itertools.pairwise(bounds):
                yield data[begin - start : end - start].decode()


class Chosen(Indexed[str]):
    """Those of `texts` that have these numbers, in their order."""

    def __init__(self, texts: Sequence[str], numbers: Sequence[int]) -> None:
        self._texts, self._numbers = texts, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def _at(self, index: int) -> str:
        return self._texts[self._numbers[index]]


class Lookup:
    """Finds the number of a text (or of bytes) that someone else keeps, by 32 bits of its hash.

    Args:
        text_of: gives the text of a number that was put here, to tell texts of equal hashes apart.
    """

    def __init__(self, text_of: Callable[[int], object]) -> None:
        self._text_of = text_of
        self._count = 0
        self._hashes, self._numbers = array("I", [0]) * 8, array("i", [-1]) * 8

    def find(self, text: object) -> int:
        """Give the number of `text`, -1 where it has none."""
        return self._numbers[self._slot(text)]

    def add(self, text: object, number: int) -> int:
        """Give the number of `text`, which is `number` where it had none."""
        slot = self._slot(text)
        if self._numbers[slot] < 0:
            self._fill(slot, text, number)
            return number
        return self._numbers[slot]

    def put(self, text: object, number: int) -> int:
        """Make `number` that of `text`; gives the one of before, -1 where it had none."""
        slot = self._slot(text)
        before = self._numbers[slot]
        if before < 0:
            self._fill(slot, text, number)
        else:
            self._numbers[slot] = number
        return before

    def _slot(self, text: object) -> int:
        """Give the place of `text`, or the free one where it belongs."""
        hashes, numbers, last = self._hashes, self._numbers, len(self._numbers) - 1
        hashed = hash(text) & 0xFFFFFFFF
        slot = hashed & last
        while (number := numbers[slot]) >= 0:
            if hashes[slot] == hashed and self._text_of(number) == text:
                break
            slot = (slot + 1) & last
        return slot

    def _fill(self, slot: int, text: object, number: int) -> None:
        self._hashes[slot], self._numbers[slot] = hash(text) & 0xFFFFFFFF, number
        self._count += 1
        if self._count > FULL * len(self._numbers):
            self._grow()

    def _grow(self) -> None:
        before = zip(self._hashes, self._numbers, strict=True)
        size = 2 * len(self._numbers)
        hashes, numbers = array("I", [0]) * size, array("i", [-1]) * size
        for hashed, number in before:
            if number >= 0:
                slot = hashed & (size - 1)
                while numbers[slot] >= 0:
                    slot = (slot + 1) & (size - 1)
                hashes[slot], numbers[slot] = hashed, number
        self._hashes, self._numbers = hashes, numbers
