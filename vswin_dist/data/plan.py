"""Which samples every rank reads at every step: a pure function of the manifest's fingerprint, seed and epoch.

The order of the global batches never depends on the number of ranks, workers or restarts. A rank takes an equal
slice of each global batch; the last ``num_samples % global_batch`` samples of an epoch's order are left out of that
epoch (another order leaves out others in the next).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vswin_dist.errors import ConfigError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The global order of one training.

    Args:
        fingerprint: of the manifest whose samples are numbered 0..num_samples-1.
        global_batch: samples in one optimizer step over all ranks.

    Raises:
        ConfigError: fewer samples than one global batch.
    """

    fingerprint: str
    num_samples: int
    seed: int
    global_batch: int

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch:
            raise ConfigError(f"the dataset has {self.num_samples} samples, fewer than one global batch of "
                              f"{self.global_batch}: lower training.global_batch")

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.global_batch

    @property
    def left_out(self) -> int:
        """Samples of each epoch's order that fill no global batch."""
        return self.num_samples % self.global_batch

    def order(self, epoch: int) -> Indices:
        """The permutation of all samples that epoch `epoch` follows, int64 [num_samples]."""
        return _permutation(self.fingerprint, self.num_samples, self.seed, epoch)

    def batch(self, step: int) -> tuple[int, Indices]:
        """(epoch, sample indices int64 [global_batch]) of the global step `step`, in constant time per epoch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch
        return epoch, self.order(epoch)[start:start + self.global_batch]

    def rank_batch(self, step: int, rank: int, world: int) -> tuple[int, Indices]:
        """(epoch, indices int64 [global_batch / world]) of `rank` among `world` at the global step `step`."""
        check_world(self.global_batch, world)
        share = self.global_batch // world
        epoch, indices = self.batch(step)
        return epoch, indices[rank * share:(rank + 1) * share]

    def micro_batches(self, steps: range, rank: int, world: int, micro_batch: int) -> Iterator[list[tuple[int, int]]]:
        """For each step of `steps`, `rank`'s micro-batches in order, each a list of (epoch, sample index)."""
        check_batch(self.global_batch, world, micro_batch)
        for step in steps:
            epoch, indices = self.rank_batch(step, rank, world)
            for start in range(0, len(indices), micro_batch):
                yield [(epoch, int(i)) for i in indices[start:start + micro_batch]]


@lru_cache(maxsize=2)
def _permutation(fingerprint: str, num_samples: int, seed: int, epoch: int) -> Indices:
    digest = hashlib.sha256(f"{fingerprint}/{seed}/{epoch}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    order = generator.permutation(num_samples).astype(np.int64)
    order.setflags(write=False)
    return order


def check_world(global_batch: int, world: int) -> None:
    """Refuse a number of ranks that does not divide the global batch."""
    if world > global_batch:
        raise ConfigError(f"training.workers={world} is more than the {global_batch} samples of a global batch "
                          "(training.global_batch): every rank needs at least one")
    if global_batch % world:
        fits = [w for w in range(1, world + 1) if global_batch % w == 0]
        raise ConfigError(f"training.global_batch={global_batch} does not divide by training.workers={world}: "
                          f"{global_batch % world} samples would be left. Nearest number of workers: {fits[-1]}")


def check_batch(global_batch: int, world: int, micro_batch: int) -> int:
    """The accumulation steps; refuses sizes that do not divide.

    Returns:
        global_batch / (world * micro_batch)
    """
    check_world(global_batch, world)
    share = global_batch // world
    if share % micro_batch:
        fits = [m for m in range(1, micro_batch + 1) if share % m == 0]
        raise ConfigError(f"a rank's share of {share} samples (training.global_batch={global_batch} over {world} "
                          f"workers) does not divide by training.micro_batch={micro_batch}. Nearest: {fits[-1]}")
    return share // micro_batch


def rank_share(num_samples: int, rank: int, world: int, batch: int) -> tuple[list[list[int]], int]:
    """Evaluation's split: every sample on exactly one rank, and the number of rounds that all ranks take.

    Returns:
        (this rank's batches of sample indices, rounds). A rank with fewer batches than rounds takes part in the
        remaining ones with an empty batch, so that collective operations stay equal.
    """
    mine = list(range(rank, num_samples, world))
    batches = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    most = -(-num_samples // world)
    return batches, -(-most // batch)
