"""Memory for batches that a worker process shares with the rank that takes them, and uses again.

A page of fresh shared memory costs its first writer and its first reader a fault each, more than a copy of it. So each
worker keeps a few buffers, which the rank keeps mapped: a batch in one of them travels as its number. A buffer is free again
when the last tensor over it in the rank is gone; a byte behind its content says so. Nothing waits for that: whoever keeps
batches for long, or more of them than there are buffers, gets them in memory of their own.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FREE, LENT = 0, 1  # values of a buffer's last byte

_Mapped = dict[tuple[int, int, int], NDArray[np.uint8]]  # worker, number, bytes -> the buffer in the rank's memory
_RINGS: dict[str, _Mapped] = {}  # in a rank: of each of its iterators that is not at its end


class Room:
    """Room for one batch: fill `tensor` and send `part`, once."""

    def __init__(self, tensor: Tensor, sender: tuple[Any, ...] | None = None) -> None:
        self.tensor, self._sender = tensor, sender

    def part(self, count: int | None = None) -> Tensor:
        """Give the first `count` entries of the tensor, or all, as what the rank gets as a tensor."""
        made = self.tensor[:count]
        if self._sender is None:
            return made
        return _Sent(*self._sender, tuple(made.shape))  # type: ignore[return-value] # one, once it has arrived


class BatchMemory:
    """The buffers of one process, uint8.

    Args:
        ring: the name that `open_ring` gave the rank's side.
        worker: the process, by its number; None: this is the rank itself, which shares nothing.
        most: buffers that it keeps.
    """

    def __init__(self, ring: str, worker: int | None, most: int) -> None:
        self.ring, self.worker, self.most = ring, worker, most
        self._buffers: list[Tensor] = []

    def take(self, shape: Sequence[int]) -> Room:
        """Find room for one batch; its content is anything.

        What is decoded never lies in the process's heap, where blocks of a batch's size leave holes that glibc does not
        fill again: workers grew to some forty times their batch.
        """
        size = math.prod(shape)
        if self.worker is None:
            return Room(torch.empty(tuple(shape), dtype=torch.uint8))
        for number, buffer in enumerate(self._buffers):
            if buffer[-1] == FREE:
                first = len(buffer) <= size
                if first:  # batches have become larger
                    buffer = self._buffers[number] = _shared(size + 1)
                return self._lend(number, buffer, shape, first)
        if len(self._buffers) < self.most:
            self._buffers.append(_shared(size + 1))
            return self._lend(len(self._buffers) - 1, self._buffers[-1], shape, True)
        return Room(_shared(size).view(tuple(shape)))

    def _lend(self, number: int, buffer: Tensor, shape: Sequence[int], first: bool) -> Room:
        buffer[-1] = LENT
        where = (self.ring, (self.worker, number, len(buffer)), buffer if first else None)
        return Room(buffer[: math.prod(shape)].view(tuple(shape)), where)


class _Sent:
    """A tensor in a buffer on its way to the rank, where unpickling makes it one."""

    def __init__(self, *what: Any) -> None:
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, self.what


def open_ring(name: str) -> None:
    """Let tensors of the ring `name` arrive in this process, the rank."""
    _RINGS[name] = {}


def close_ring(name: str) -> None:
    """Forget the buffers of a ring; those under tensors that are still there go with them."""
    _RINGS.pop(name, None)


def _arrived(ring: str, where: tuple[int, int, int], buffer: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Make the tensor that a worker has sent; an empty one where nobody waits for it any longer."""
    mapped = _RINGS.get(ring)
    if mapped is None:
        return torch.empty(0, dtype=torch.uint8)
    if buffer is not None:
        for known in [known for known in mapped if known[:2] == where[:2]]:  # a smaller one of this number
            del mapped[known]
        mapped[where] = buffer.numpy()
    whole = mapped[where]
    content = whole[: math.prod(shape)]
    # torch holds on to this very array while there is a tensor over it
    weakref.finalize(content, whole.__setitem__, -1, FREE).atexit = False
    return torch.from_numpy(content).view(shape)


def _shared(size: int) -> Tensor:
    """Allocate uint8 [size] in memory that processes can share."""
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
