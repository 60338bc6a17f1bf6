"""Which samples every rank reads at every step: a pure function of the manifest's fingerprint, seed and epoch.

The order of the global batches never depends on the number of ranks, workers or restarts. A rank takes an equal
slice of each global batch; what is left of an epoch's order after the last whole global batch is left out of that
epoch (another order leaves out others in the next). Any step can be the first: it costs one permutation.

Options change which samples an epoch's order holds, never how it is cut: a subset, classes equally often, and
repeated augmentation (Hoffer et al., "Augment your batch", 2020).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vswin_dist import node_cache
from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import ConfigError, DataError, nearest
from vswin_dist.manifest import Manifest, nfc, read_manifest
from vswin_dist.node_cache import Arrays
from vswin_dist.randomness import named_rng

Indices = NDArray[np.int64]
Order = NDArray[np.integer]  # int32 where that counts all samples: half the memory, and the same shuffle
SHARED_FROM = 1 << 20  # samples from which an order, and what it is made of, are held once by a node, not by each process
SORTED_FROM = 1 << 20  # samples of an epoch from which its order is that of sorted random numbers, not NumPy's shuffle


class Occurrence(NamedTuple):
    """One position of a global batch and the sample that fills it."""

    step: int  # global step
    position: int  # within the global batch
    epoch: int
    sample: int  # its index in the manifest
    copy: int  # its earlier occurrences in the epoch: 0 unless classes are balanced or samples repeated


class Slice(NamedTuple):
    """A global batch, or one rank's part of it: samples and copies, integers [n], as in `Occurrence`."""

    epoch: int
    samples: Order
    copies: Order


@dataclass(frozen=True, eq=False)
class Plan:
    """The global order of one training run; see `make_plan`. It can be pickled for processes of this node.

    Args:
        fingerprint: of the manifest whose samples are numbered 0..num_samples-1.
        global_batch: samples in one optimizer step over all ranks.
        repeats: times that each sample stands in its global batch, each time augmented otherwise; an epoch takes as
            many times the steps.
        pool: indices of the samples that are used, int64; None: all.
        balanced: class id of each sample, int64 [num_samples], where classes come equally often; None: each
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
            raise ConfigError(
                f"training.global_batch={self.global_batch} does not divide by data.repeats={self.repeats}: "
                "every sample stands that often in its global batch"
            )
        if self.epoch_samples < self.distinct:
            raise ConfigError(
                f"the dataset has {self.epoch_samples} samples, fewer than one global batch of "
                f"{self.distinct}: lower training.global_batch"
            )

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
        identity = {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "repeats": self.repeats,
            "pool": chosen[0],
            "balanced": chosen[1],
        }
        return identity | {"order": "sorted"} if self._is_sorted else identity

    def __reduce__(self) -> Any:
        """Pickle large arrays as the name of the node's copy, where it has one."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        large = {name: given[name] for name in ("pool", "balanced") if given[name] is not None}
        if not large or not self._is_shared:
            return _plan, (given,)
        name = f"plans/{self._digest}"
        node_cache.shared(name, lambda: Arrays(large))
        return _plan, (given,) if node_cache.load(name) is None else ({**given, **dict.fromkeys(large)}, name)

    @property
    def _is_shared(self) -> bool:
        """Whether a node holds its arrays once."""
        return self.num_samples >= SHARED_FROM

    @property
    def _is_sorted(self) -> bool:
        """Whether `_sorted_order` makes an epoch's order."""
        return self.balanced is None and self.epoch_samples >= SORTED_FROM

    @property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:32]

    def order(self, epoch: int) -> Order:
        """Give the samples in the order of `epoch`, integers [epoch_samples]."""
        return _order(self, epoch)[0]

    def epoch_steps(self, epoch: int) -> Slice:
        """Give all global batches of an epoch: samples and copies, integers [steps_per_epoch, global_batch]."""
        shape = (self.steps_per_epoch, self.distinct)
        samples, copies = (a[: shape[0] * shape[1]].reshape(shape) for a in _order(self, epoch))
        return Slice(epoch, *self._repeat(samples, copies))

    def batch(self, step: int) -> Slice:
        """Give the global batch of the global step `step`, in constant time once its epoch's order is known."""
        epoch, within = divmod(step, self.steps_per_epoch)
        part = slice(within * self.distinct, (within + 1) * self.distinct)
        samples, copies = (a[part] for a in _order(self, epoch))
        return Slice(epoch, *self._repeat(samples, copies))

    def videos_read(self, steps: int, enough: float) -> int:
        """Count the samples that the first `steps` steps take, each once; no further epoch once they are `enough`."""
        seen, found = np.zeros(self.num_samples, dtype=bool), 0
        for first in range(0, steps, self.steps_per_epoch):
            within = min(steps - first, self.steps_per_epoch)
            seen[self.order(first // self.steps_per_epoch)[: within * self.distinct]] = True
            found = int(seen.sum())
            if found >= min(enough, self.epoch_samples):
                break
        return found

    def any_sample(self, rng: np.random.Generator) -> int:
        """Choose one of the samples that the plan uses, as `rng` says."""
        index = int(rng.integers(self.epoch_samples))
        return index if self.pool is None else int(self.pool[index])

    def occurrence_number(self, occurrence: Occurrence) -> int:
        """Compute the numbers of an epoch's occurrences: what the model's random streams are keyed by.

        It is the sample's own index where the epoch has it once; `sample_and_copy` takes it apart.
        """
        return occurrence.sample + occurrence.copy * self.num_samples

    def sample_and_copy(self, number: int) -> tuple[int, int]:
        """Take an `occurrence_number` apart."""
        copy, sample = divmod(number, self.num_samples)
        return sample, copy

    def _repeat(self, samples: Order, copies: Order) -> tuple[Order, Order]:
        """Each sample `repeats` times along the last axis, the copies far apart: neighbours may be mixed."""
        if self.repeats == 1:
            return samples, copies
        which = np.repeat(np.arange(self.repeats), self.distinct)
        tiles = (1,) * (samples.ndim - 1) + (self.repeats,)
        return np.tile(samples, tiles), np.tile(copies, tiles) * self.repeats + which

    def rank_batch(self, step: int, rank: int, world_size: int) -> Slice:
        """Cut out what `rank` takes of the global batch of `step`: global_batch / world_size samples."""
        check_world_size(self.global_batch, world_size)
        size = self.global_batch // world_size
        part = slice(rank * size, (rank + 1) * size)
        epoch, samples, copies = self.batch(step)
        return Slice(epoch, samples[part], copies[part])

    def micro_batches(self, steps: range, rank: int, world_size: int, micro_batch: int) -> Iterator[list[Occurrence]]:
        """Give `rank`'s micro-batches of each step of `steps`, in order.

        In the middle of each epoch the order of the next one is begun, beside whatever else is done: ten million samples
        take half a second.
        """
        check_batch(self.global_batch, world_size, micro_batch)
        first, middle = rank * (self.global_batch // world_size), self.steps_per_epoch // 2
        for step in steps:
            following = step // self.steps_per_epoch + 1
            if step % self.steps_per_epoch == middle and following * self.steps_per_epoch < steps.stop and self._is_shared:
                threading.Thread(target=self.order, args=(following,), name="next-order", daemon=True).start()
            epoch, samples, copies = self.rank_batch(step, rank, world_size)
            for start in range(0, len(samples), micro_batch):
                yield [
                    Occurrence(step, first + i, epoch, int(samples[i]), int(copies[i]))
                    for i in range(start, start + micro_batch)
                ]


def _plan(given: dict[str, Any], name: str = "") -> Plan:
    """Make the plan that another process of this node has pickled; its arrays are those that the node calls `name`."""
    if name:
        found = node_cache.load(name)
        if found is None:
            raise DataError(f"the plan's samples are no longer in VSWIN_CACHE ({node_cache.path(name)}). Start again")
        given |= found.arrays
    return Plan(**given)


def make_plan(manifest: Manifest, data: DataSettings, seed: int, global_batch: int) -> Plan:
    """Plan a training run on `manifest` with the subset, classes, balance and repeats of `data`.

    Raises:
        ConfigError: a class that the manifest does not have, or what `Plan` refuses.
    """
    wanted = None
    if data.classes is not None:
        ids = {nfc(name): i for i, name in enumerate(manifest.classes)}
        if unknown := [c for c in data.classes if nfc(c) not in ids]:
            raise ConfigError(
                f"data.classes names {unknown[0]!r}, which is not a class of {data.train}."
                f"{nearest(unknown[0], manifest.classes)}"
            )
        wanted = np.array([ids[nfc(c)] for c in data.classes], dtype=np.int64)
    chosen, balanced = data.subset != 1 or wanted is not None, data.balance == "class"
    labels = manifest.samples.numbers("class_id").astype(np.int64) if chosen or balanced else np.empty(0, np.int64)
    return Plan(
        manifest.fingerprint,
        len(manifest.samples),
        seed,
        global_batch,
        data.repeats,
        choose(labels, data.subset, wanted, manifest.fingerprint, seed) if chosen else None,
        labels if balanced else None,
    )


def validation_set(data: DataSettings) -> Manifest | None:
    """Read the manifest that `data` validates on, with the samples of `data.classes` alone; None: there is none.

    Raises:
        ConfigError: it has no sample of these classes. DataError: it cannot be read.
    """
    if not data.val:
        return None
    manifest = read_manifest(data.val)
    if data.classes is None:
        return manifest
    chosen = {nfc(c) for c in data.classes}
    wanted = [number for number, name in enumerate(manifest.classes) if nfc(name) in chosen]
    rows = np.flatnonzero(np.isin(manifest.samples.numbers("class_id"), wanted))
    if not len(rows):
        raise ConfigError(f"the validation set {data.val} has no video of data.classes={list(data.classes)}")
    return replace(manifest, samples=manifest.samples[rows])


def choose(labels: Indices, fraction: float, classes: Indices | None, fingerprint: str, seed: int) -> Indices | None:
    """Choose the samples to use, ascending: of each class the rounded `fraction`, at least one; None for all.

    A smaller fraction is part of a larger one, so that results over fractions are comparable.
    """
    if fraction == 1 and classes is None:
        return None
    order = named_rng(f"{fingerprint}/{seed}/subset").permutation(len(labels))
    kept = []
    for members in _by_class(order.astype(np.int64), labels):
        if classes is None or labels[members[0]] in classes:
            kept.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=np.int64)


def _by_class(samples: Indices, labels: Indices) -> list[Indices]:
    """Return `samples` split by class, those of each in their order."""
    ordered = samples[np.argsort(labels[samples], kind="stable")]
    return np.split(ordered, np.flatnonzero(np.diff(labels[ordered])) + 1)


@lru_cache(maxsize=2)
def _order(plan: Plan, epoch: int) -> tuple[Order, Order]:
    """Return an epoch's samples and copies, integers [epoch_samples] each."""
    if plan.epoch_samples < SHARED_FROM:
        found = _make_order(plan, epoch)
    else:
        found = node_cache.shared(f"orders/{plan._digest}-{epoch}", lambda: Arrays(_make_order(plan, epoch))).arrays
    return found["samples"], found.get("copies", np.broadcast_to(np.int32(0), plan.epoch_samples))


def _make_order(plan: Plan, epoch: int) -> dict[str, Order]:
    """Shuffle an epoch's samples; without `copies` where all are 0."""
    generator = named_rng(f"{plan.fingerprint}/{plan.seed}/{epoch}")
    kind = np.dtype(np.int32 if plan.num_samples <= np.iinfo(np.int32).max else np.int64)
    made: dict[str, Order]
    if plan._is_sorted:
        places = _sorted_order(plan.epoch_samples, generator)
        made = {"samples": (places if plan.pool is None else plan.pool[places]).astype(kind)}
    elif plan.balanced is None:
        made = {"samples": np.arange(plan.num_samples, dtype=kind) if plan.pool is None else plan.pool.astype(kind)}
        generator.shuffle(made["samples"])
    else:
        pool = np.arange(plan.num_samples, dtype=np.int64) if plan.pool is None else plan.pool
        samples, copies = _balanced_order(pool, plan.balanced, generator)
        made = {"samples": samples.astype(kind), "copies": copies.astype(kind)}
    made["samples"].setflags(write=False)
    return made


def _sorted_order(count: int, generator: np.random.Generator) -> NDArray[np.uint64]:
    """Give 0..count-1 in a random order: each number in the low bits of a random one, these sorted in place.

    NumPy sorts 64-bit integers by vector instructions, on every processor to the same result, in a third of the time of its
    shuffle, which waits for memory at each of its swaps. The random bits above the number are 40 for 16 million of them; the
    pairs that have them equal (50 of ten million) keep their own order.
    """
    bits = np.uint64((count - 1).bit_length())
    numbers = generator.integers(0, np.iinfo(np.uint64).max, count, np.uint64, endpoint=True)
    numbers >>= bits
    numbers <<= bits
    numbers |= np.arange(count, dtype=np.uint64)
    numbers.sort()
    numbers &= (np.uint64(1) << bits) - np.uint64(1)
    return numbers


def _balanced_order(pool: Indices, labels: Indices, generator: np.random.Generator) -> tuple[Indices, Indices]:
    """As many occurrences as `pool` has samples, in rounds of one of each class, the classes shuffled in each round.

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
    return tuple(np.take_along_axis(a, turns, 1).ravel()[: len(pool)] for a in (samples, copies))  # type: ignore[return-value]


def check_world_size(global_batch: int, world_size: int) -> None:
    """Refuse a world size that does not divide the global batch.

    Raises:
        ConfigError: it does not; names the nearest that does.
    """
    if world_size > global_batch:
        raise ConfigError(
            f"training.workers={world_size} is more than the {global_batch} samples of a global batch "
            "(training.global_batch): every rank needs at least one"
        )
    if global_batch % world_size:
        fits = [w for w in range(1, world_size + 1) if global_batch % w == 0]
        raise ConfigError(
            f"training.global_batch={global_batch} does not divide by training.workers={world_size}: "
            f"{global_batch % world_size} samples would be left. Nearest number of workers: {fits[-1]}"
        )


def check_batch(global_batch: int, world_size: int, micro_batch: int) -> int:
    """Count the accumulation steps.

    Returns:
        global_batch / (world_size * micro_batch)

    Raises:
        ConfigError: sizes that do not divide; names the nearest that do.
    """
    check_world_size(global_batch, world_size)
    per_rank = global_batch // world_size
    if per_rank % micro_batch:
        fits = [m for m in range(1, micro_batch + 1) if per_rank % m == 0]
        raise ConfigError(
            f"a rank's part of {per_rank} samples (training.global_batch={global_batch} over {world_size} "
            f"workers) does not divide by training.micro_batch={micro_batch}. Nearest: {fits[-1]}"
        )
    return per_rank // micro_batch


def fitting_world_sizes(global_batch: int, least: int, most: int, micro_batch: int) -> dict[int, int]:
    """Find the world sizes from `least` to `most` that divide the global batch, each with its accumulation steps.

    Raises:
        ConfigError: none does.
    """
    fits = {
        world_size: global_batch // (world_size * micro_batch)
        for world_size in range(least, most + 1)
        if global_batch % (world_size * micro_batch) == 0
    }
    if not fits:
        check_batch(global_batch, most, micro_batch)  # names the numbers
    return fits


@dataclass(frozen=True)
class Batches(Sequence[range]):
    """Some of the batches of `size` neighbours out of `samples`, the last one shorter; made as they are asked for."""

    samples: int
    size: int
    numbers: Sequence[int]  # of the batches

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> range:  # type: ignore[override] # no part of it is asked for
        start = self.numbers[place] * self.size
        return range(start, min(start + self.size, self.samples))


def evaluation_batches(
    num_samples: int, rank: int, world_size: int, batch: int, todo: Sequence[int] | None = None
) -> tuple[Batches, int]:
    """Split an evaluation: every sample on exactly one rank, and the number of rounds that all ranks take.

    Which samples share a batch does not depend on the ranks: a sample meets the same neighbours at the same place, and so
    has the same scores to the last digit.

    Args:
        todo: the numbers of the batches that count; None: all.

    Returns:
        (this rank's batches of sample indices, rounds). A rank with fewer batches than rounds takes part in the
        remaining ones with an empty batch, so that collective operations stay equal.
    """
    numbers = range(-(-num_samples // batch)) if todo is None else todo
    return Batches(num_samples, batch, numbers[rank::world_size]), -(-len(numbers) // world_size)
