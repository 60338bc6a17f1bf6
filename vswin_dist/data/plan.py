"""Which samples every rank reads at every step: a pure function of the manifest's fingerprint, seed and epoch.

The order of the global batches never depends on the number of ranks, workers or restarts. A rank takes an equal
slice of each global batch; what is left of an epoch's order after the last whole global batch is left out of that
epoch (another order leaves out others in the next). Any step can be the first: it costs one permutation.

Options change which samples an epoch's order holds, never how it is cut: a subset, classes drawn equally often, and
repeated augmentation (Hoffer et al., "Augment your batch", 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import ConfigError, nearest
from vswin_dist.manifest import Manifest, read_manifest

Indices = NDArray[np.int64]


class Draw(NamedTuple):
    """One place of a global batch and the sample that fills it."""

    step: int  # global step
    place: int  # within the global batch
    epoch: int
    sample: int  # its number in the manifest
    copy: int  # how often the epoch has drawn it before: 0 unless classes are balanced or samples repeated


class Slice(NamedTuple):
    """A global batch, or one rank's part of it: samples and copies int64 [n], as in `Draw`."""

    epoch: int
    samples: Indices
    copies: Indices


@dataclass(frozen=True, eq=False)
class Plan:
    """The global order of one training; see `make_plan`.

    Args:
        fingerprint: of the manifest whose samples are numbered 0..num_samples-1.
        global_batch: samples in one optimizer step over all ranks.
        repeats: times that each sample stands in its global batch, each time augmented otherwise; an epoch takes as
            many times the steps.
        pool: numbers of the samples that are used, int64; None: all.
        balanced: class id of each sample, int64 [num_samples], where classes are drawn equally often; None: each
            sample of the pool once an epoch.

    Raises:
        ConfigError: fewer samples than one global batch, or repeats that do not divide it.
    """

    fingerprint: str
    num_samples: int
    seed: int
    global_batch: int
    repeats: int = 1
    pool: Indices | None = field(default=None, repr=False)
    balanced: Indices | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.global_batch % self.repeats:
            raise ConfigError(f"training.global_batch={self.global_batch} does not divide by data.repeats={self.repeats}: "
                              "every sample stands that often in its global batch")
        if self.epoch_samples < self.distinct:
            raise ConfigError(f"the dataset has {self.epoch_samples} samples, fewer than one global batch of "
                              f"{self.distinct}: lower training.global_batch")

    @property
    def distinct(self) -> int:
        """Samples of the order that one global batch takes."""
        return self.global_batch // self.repeats

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch's order."""
        return self.num_samples if self.pool is None else len(self.pool)

    @property
    def steps_per_epoch(self) -> int:
        return self.epoch_samples // self.distinct

    @property
    def left_out(self) -> int:
        """Samples of each epoch's order that fill no global batch."""
        return self.epoch_samples % self.distinct

    @property
    def identity(self) -> dict[str, Any]:
        """What the order depends on, as plain values: plans with equal ones give equal batches."""
        chosen = [None if a is None else hashlib.sha256(a.tobytes()).hexdigest()[:16] for a in (self.pool, self.balanced)]
        return {"fingerprint": self.fingerprint, "seed": self.seed, "global_batch": self.global_batch,
                "repeats": self.repeats, "pool": chosen[0], "balanced": chosen[1]}

    def order(self, epoch: int) -> Indices:
        """The samples in the order that epoch `epoch` follows, int64 [epoch_samples]."""
        return _order(self, epoch)[0]

    def epoch_steps(self, epoch: int) -> Slice:
        """All global batches of an epoch: samples and copies int64 [steps_per_epoch, global_batch]."""
        shape = (self.steps_per_epoch, self.distinct)
        samples, copies = (a[:shape[0] * shape[1]].reshape(shape) for a in _order(self, epoch))
        return Slice(epoch, *self._repeat(samples, copies))

    def batch(self, step: int) -> Slice:
        """The global batch of the global step `step`, in constant time once its epoch's order is known."""
        epoch, within = divmod(step, self.steps_per_epoch)
        part = slice(within * self.distinct, (within + 1) * self.distinct)
        samples, copies = (a[part] for a in _order(self, epoch))
        return Slice(epoch, *self._repeat(samples, copies))

    def videos_read(self, steps: int, enough: float) -> int:
        """How many samples, each counted once, the first `steps` steps take; counts no further epoch once it is `enough`."""
        seen, found = np.zeros(self.num_samples, dtype=bool), 0
        for first in range(0, steps, self.steps_per_epoch):
            within = min(steps - first, self.steps_per_epoch)
            seen[self.order(first // self.steps_per_epoch)[:within * self.distinct]] = True
            found = int(seen.sum())
            if found >= min(enough, self.epoch_samples):
                break
        return found

    def any_sample(self, rng: np.random.Generator) -> int:
        """One of the samples that the plan uses, as `rng` says."""
        number = int(rng.integers(self.epoch_samples))
        return number if self.pool is None else int(self.pool[number])

    def _repeat(self, samples: Indices, copies: Indices) -> tuple[Indices, Indices]:
        """Each sample `repeats` times along the last axis, the copies far apart: neighbours may be mixed."""
        if self.repeats == 1:
            return samples, copies
        again = np.repeat(np.arange(self.repeats), self.distinct)
        tiles = (1,) * (samples.ndim - 1) + (self.repeats,)
        return np.tile(samples, tiles), np.tile(copies, tiles) * self.repeats + again

    def rank_batch(self, step: int, rank: int, world: int) -> Slice:
        """The part of `rank` among `world` in the global batch of `step`: global_batch / world samples."""
        check_world(self.global_batch, world)
        share = self.global_batch // world
        epoch, samples, copies = self.batch(step)
        return Slice(epoch, samples[rank * share:(rank + 1) * share], copies[rank * share:(rank + 1) * share])

    def micro_batches(self, steps: range, rank: int, world: int, micro_batch: int) -> Iterator[list[Draw]]:
        """For each step of `steps`, `rank`'s micro-batches in order."""
        check_batch(self.global_batch, world, micro_batch)
        first = rank * (self.global_batch // world)
        for step in steps:
            epoch, samples, copies = self.rank_batch(step, rank, world)
            for start in range(0, len(samples), micro_batch):
                yield [Draw(step, first + i, epoch, int(samples[i]), int(copies[i]))
                       for i in range(start, start + micro_batch)]


def make_plan(manifest: Manifest, data: DataSettings, seed: int, global_batch: int) -> Plan:
    """The plan of a training on `manifest` with the subset, classes, balance and repeats of `data`.

    Raises:
        ConfigError: a class that the manifest does not have, a share out of range, or what `Plan` refuses.
    """
    if not 0 < data.subset <= 1:
        raise ConfigError(f"data.subset={data.subset}: expected a share above 0, at most 1")
    labels = np.array([s.class_id for s in manifest.samples], dtype=np.int64)
    wanted = None
    if data.classes is not None:
        if unknown := [c for c in data.classes if c not in manifest.classes]:
            raise ConfigError(f"data.classes names {unknown[0]!r}, which is no class of {data.train}."
                              f"{nearest(unknown[0], manifest.classes)}")
        wanted = np.array([manifest.classes.index(c) for c in data.classes], dtype=np.int64)
    pool = choose(labels, data.subset, wanted, manifest.fingerprint, seed)
    return Plan(manifest.fingerprint, len(labels), seed, global_batch, data.repeats, pool,
                labels if data.balance == "class" else None)


def validation_set(data: DataSettings) -> Manifest | None:
    """The manifest of the set that `data` validates on, with the samples of `data.classes` alone; None: there is none.

    Raises:
        ConfigError: it has no sample of these classes. DataError: it cannot be read.
    """
    if not data.val:
        return None
    manifest = read_manifest(data.val)
    if data.classes is None:
        return manifest
    kept = [s for s in manifest.samples if manifest.classes[s.class_id] in data.classes]
    if not kept:
        raise ConfigError(f"the validation set {data.val} has no video of data.classes={list(data.classes)}")
    return replace(manifest, samples=kept)


def choose(labels: Indices, share: float, classes: Indices | None, fingerprint: str, seed: int) -> Indices | None:
    """Numbers of the samples to use, ascending: of each class the rounded `share`, at least one; None for all.

    A smaller share is part of a larger one, so that results over shares are comparable.
    """
    if share == 1 and classes is None:
        return None
    order = _generator(f"{fingerprint}/{seed}/subset").permutation(len(labels))
    kept = []
    for members in _by_class(order.astype(np.int64), labels):
        if classes is None or labels[members[0]] in classes:
            kept.append(members[:max(1, round(share * len(members)))])
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=np.int64)


def _by_class(samples: Indices, labels: Indices) -> list[Indices]:
    """`samples` split by class, those of each in their order."""
    ordered = samples[np.argsort(labels[samples], kind="stable")]
    return np.split(ordered, np.flatnonzero(np.diff(labels[ordered])) + 1)


def _generator(name: str) -> np.random.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


@lru_cache(maxsize=2)
def _order(plan: Plan, epoch: int) -> tuple[Indices, Indices]:
    """An epoch's samples and copies, int64 [epoch_samples] each."""
    generator = _generator(f"{plan.fingerprint}/{plan.seed}/{epoch}")
    pool = np.arange(plan.num_samples, dtype=np.int64) if plan.pool is None else plan.pool
    if plan.balanced is None:
        order, copies = pool[generator.permutation(len(pool))], np.broadcast_to(np.int64(0), len(pool))
    else:
        order, copies = _balanced_order(pool, plan.balanced, generator)
    order.setflags(write=False)
    return order, copies


def _balanced_order(pool: Indices, labels: Indices, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """As many draws as `pool` has samples, in rounds of one draw of each class, the classes shuffled in each round.

    A class goes through its samples in a new order each time round; of a class with more samples than rounds, the
    epoch's order takes a random part.
    """
    classes = _by_class(pool, labels)
    rounds = -(-len(pool) // len(classes))
    samples, copies = np.empty((2, rounds, len(classes)), dtype=np.int64)
    for number, members in enumerate(classes):
        times = -(-rounds // len(members))
        samples[:, number] = generator.permuted(np.tile(members, (times, 1)), axis=1).ravel()[:rounds]
        copies[:, number] = np.arange(rounds) // len(members)
    turns = generator.permuted(np.tile(np.arange(len(classes)), (rounds, 1)), axis=1)
    return tuple(np.take_along_axis(a, turns, 1).ravel()[:len(pool)] for a in (samples, copies))  # type: ignore[return-value]


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


def fitting_worlds(global_batch: int, least: int, most: int, micro_batch: int) -> dict[int, int]:
    """The numbers of ranks from `least` to `most` that divide the global batch, each with its accumulation steps.

    Raises:
        ConfigError: none does.
    """
    fits = {world: global_batch // (world * micro_batch) for world in range(least, most + 1)
            if global_batch % (world * micro_batch) == 0}
    if not fits:
        check_batch(global_batch, most, micro_batch)  # names the numbers
    return fits


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
