"""The device that a process computes on, and its rank among the processes that compute together."""

from __future__ import annotations

import functools
import multiprocessing.util
import resource
import tempfile
from dataclasses import dataclass
from typing import TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist

T = TypeVar("T")
LONGEST_FOR_SOCKETS = 70  # characters of the folder of temporary files; multiprocessing adds 32, and a path may have 107
STEPS_LEFT = "steps_left"  # the metric that a rank reports: whether more ranks are worth a restart


@dataclass(frozen=True)
class Rank:
    """One process of a training run or an evaluation. Its collectives are called by all ranks, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and writes."""
        return self.rank == 0

    @property
    def pins(self) -> bool:
        """True where batches are to lie in pinned memory: copies to a GPU then overlap with its work."""
        return self.device.type == "cuda"

    def print(self, text: str) -> None:
        """Print `text` once: on the main rank."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """Collect the `value` of every rank, in the order of the ranks, on all of them."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Return True on all ranks where `flag` is on one of them. Hosts wait for each other, their devices do not."""
        if self.world_size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=_host_group())
        return bool(found)

    def broadcast(self, value: T) -> T:
        """Give every rank the main rank's `value`."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


@functools.cache
def _host_group() -> dist.ProcessGroup | None:
    """Return the ranks as a group whose collectives run on the hosts; the default group where it does so."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def peak_memory(device: torch.device) -> int:
    """Return the bytes at the peak: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def place_sockets() -> None:
    """Have multiprocessing put its sockets into /tmp where TMPDIR is too long for them, as batch systems make it.

    Other temporary files stay where they are. To be called before the first process is started.
    """
    if len(tempfile.gettempdir()) > LONGEST_FOR_SOCKETS:
        with patch.object(tempfile, "tempdir", "/tmp"):  # noqa: S108
            multiprocessing.util.get_temp_dir()  # which this process and those below it keep
