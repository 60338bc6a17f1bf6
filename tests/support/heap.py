"""What a call leaves behind in the C library's heap."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest


class Heap(ctypes.Structure):
    """glibc's mallinfo2; `uordblks` are the bytes in use."""

    _fields_ = [
        (n, ctypes.c_size_t)
        for n in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


needs_heap = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library does not report its heap")


def growth(run: Callable[[], Any], calls: int = 100, rounds: int = 4) -> float:
    """Measure the bytes that a call of `run` leaves in use, in the best of some `rounds` of some `calls`."""
    in_use = ctypes.CDLL(None).mallinfo2
    in_use.restype = Heap

    def grown() -> int:
        before = in_use().uordblks
        for _ in range(calls):
            run()
        return int(in_use().uordblks - before)

    return min(grown() for _ in range(rounds)) / calls
