"""Batches of clips, read from the shards in the order of the plan.

Worker processes are started by forkserver (s3fs does not survive a fork). Worker w of W makes the batches w, w + W,
w + 2W, ... of its rank, so it knows what it will need and has the bytes on the way before it decodes. Memory is bounded:
`data.prefetch` decoded batches and what `fetch.read_ahead` states for each worker. What a sample looks like depends
on (seed, epoch, sample, copy) alone.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vswin_dist import storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.data.augment import augment, clip_rng
from vswin_dist.data.clips import train_clip, video_views
from vswin_dist.data.decode import clip_shape
from vswin_dist.data.fetch import Members, read_ahead
from vswin_dist.data.mirror import flipped_classes
from vswin_dist.data.plan import Draw, Plan, check_batch
from vswin_dist.data.quarantine import Bad
from vswin_dist.errors import CheckpointError, DataError
from vswin_dist.manifest import Manifest

AUGMENTATION, SUBSTITUTION = 1, 2  # first words of this module's random streams
SUBSTITUTES = 32  # tried for one place

T = TypeVar("T")


class Batch(TypedDict):
    """clips uint8 [B, 3, T, S, S], or planes [B, T, S * S * 3 / 2] where data.pixel_format is yuv, not augmented yet;
    labels int64 [B]; indices int64 [B], the samples' numbers in the manifest.

    draws int64 [B] are what random streams of the model are keyed by: the number of the sample that the plan had put
    there, plus the number of samples for each earlier draw of it in the epoch. `bad` are those that did not decode.
    """

    clips: Tensor
    labels: Tensor
    indices: Tensor
    draws: Tensor
    bad: list[Bad]


class ViewBatch(TypedDict):
    """views uint8 [B, V, 3, T, S, S], or planes [B, V, T, S * S * 3 / 2]; labels, indices int64 [B]; missing: (sample
    index, reason) of what failed."""

    views: Tensor
    labels: Tensor
    indices: Tensor
    missing: list[tuple[int, str]]


@dataclass(frozen=True)
class _Failure:
    """What ends the loader, as a value: an exception from a worker would arrive as a page of its trace."""

    message: str


class _Stream(IterableDataset[Any], ABC, Generic[T]):
    """The batches of one rank; in a worker process, that worker's share of them."""

    def __init__(self, manifest: Manifest, base: str, settings: DataSettings) -> None:
        self.manifest, self.base, self.settings = manifest, base, settings
        self.environment = storage.environment()

    @abstractmethod
    def batches(self) -> Iterator[list[T]]:
        """All batches of the rank, in order."""

    @abstractmethod
    def number(self, item: T) -> int:
        """The sample that `item` stands for."""

    @abstractmethod
    def collate(self, items: list[tuple[T, Future[bytes]]], members: Members) -> Any:
        """One batch from its items and their bytes."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker:
            threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
            os.environ.update(self.environment)
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = itertools.islice(self.batches(), first, None, every)
        members = Members(self.manifest, self.base, self.settings.cache_gb)
        ahead = read_ahead(mine, lambda item: members.read(self.number(item)),
                           lambda item: self.manifest.samples[self.number(item)].size)
        try:
            for items in ahead:
                yield self.collate(items, members)
        except DataError as error:
            yield _Failure(str(error))
        finally:
            ahead.close()  # type: ignore[attr-defined]
            members.close()


class _TrainStream(_Stream[Draw]):
    """A rank's micro-batches of the global steps `steps`."""

    def __init__(self, manifest: Manifest, settings: DataSettings, plan: Plan, steps: range, rank: int, world: int,
                 micro_batch: int) -> None:
        super().__init__(manifest, settings.train, settings)
        self.plan, self.steps, self.rank, self.world, self.micro_batch = plan, steps, rank, world, micro_batch
        self.flipped = flipped_classes(manifest.classes, settings.flip_labels)

    def batches(self) -> Iterator[list[Draw]]:
        return self.plan.micro_batches(self.steps, self.rank, self.world, self.micro_batch)

    def number(self, item: Draw) -> int:
        return item.sample

    def collate(self, items: list[tuple[Draw, Future[bytes]]], members: Members) -> Batch:
        clips = _room(self.settings, len(items))
        labels, numbers, bad = [], [], []
        for clip, (draw, data) in zip(clips, items, strict=True):
            label, number, failed = self.clip(draw, data.result(), members, clip)
            if self.settings.pixel_format == "rgb":  # planes are augmented where they become RGB
                clip.copy_(augment(clip, self.settings, clip_rng(self.plan.seed, draw.epoch, draw.sample, draw.copy)))
            labels.append(label)
            numbers.append(number)
            bad += failed
        draws = [d.sample + d.copy * self.plan.num_samples for d, _ in items]
        return {"clips": clips, "labels": torch.tensor(labels), "indices": torch.tensor(numbers),
                "draws": torch.tensor(draws), "bad": bad}

    def clip(self, draw: Draw, data: bytes, members: Members, out: Tensor) -> tuple[int, int, list[Bad]]:
        """Write the clip to `out`: (its class, the sample that it shows, what did not decode before it).

        Raises:
            DataError: no substitute decodes either.
        """
        copy = [draw.copy] if draw.copy else []
        rng = np.random.default_rng([AUGMENTATION, self.plan.seed, draw.epoch, draw.sample, *copy])
        number, substitutes = draw.sample, None
        failed: list[tuple[int, str]] = []
        for _ in range(SUBSTITUTES):
            try:
                sample = self.manifest.samples[number]
                label = train_clip(data, sample, self.settings, self.flipped[sample.class_id], rng, out)
                return label, number, [Bad(draw.step, draw.place, draw.epoch, i, why, number) for i, why in failed]
            except DataError as error:
                failed.append((number, str(error)))
            if substitutes is None:  # in a stream of their own, which also augments them
                substitutes = rng = np.random.default_rng(
                    [SUBSTITUTION, self.plan.seed, draw.epoch, draw.step, draw.place])
            number = self.plan.any_sample(substitutes)
            data = members.read(number)
        raise DataError(f"step {draw.step}, place {draw.place}: {SUBSTITUTES} videos in a row do not decode; the last: "
                        f"{failed[-1][1]}")


class _ViewStream(_Stream[int]):
    """The test views of `lists` of sample indices. Evaluation never substitutes: what cannot be read is missing."""

    def __init__(self, manifest: Manifest, base: str, settings: DataSettings, lists: list[list[int]], clips: int,
                 crops: int, shuffle_frames: bool) -> None:
        super().__init__(manifest, base, settings)
        self.lists, self.clips, self.crops, self.shuffle_frames = lists, clips, crops, shuffle_frames

    def batches(self) -> Iterator[list[int]]:
        return iter(self.lists)

    def number(self, item: int) -> int:
        return item

    def collate(self, items: list[tuple[int, Future[bytes]]], members: Members) -> ViewBatch:
        views = _room(self.settings, len(items), self.clips * self.crops)
        indices: list[int] = []
        missing: list[tuple[int, str]] = []
        for number, data in items:
            sample, found = self.manifest.samples[number], views[len(indices)]
            try:
                video_views(data.result(), sample.frames, sample.width, sample.height, sample.key, self.settings,
                            self.clips, self.crops, found)
            except DataError as error:
                missing.append((number, str(error)))
                continue
            if self.shuffle_frames:
                order = np.random.default_rng([AUGMENTATION, number]).permutation(self.settings.frames)
                found.copy_(found.index_select(2 if found.ndim == 5 else 1, torch.from_numpy(order)))
            indices.append(number)
        labels = [self.manifest.samples[i].class_id for i in indices]
        return {"views": views[:len(indices)], "labels": torch.tensor(labels, dtype=torch.int64),
                "indices": torch.tensor(indices, dtype=torch.int64), "missing": missing}


def _room(settings: DataSettings, *count: int) -> Tensor:
    """Room for ``[*count]`` clips, uint8; in a worker process in the memory that it shares with the one that takes them.

    A batch then costs no second copy. And what is decoded never lies in the process's heap, where blocks of a batch's
    size leave holes that glibc does not fill again: workers grew to some forty times their batch.
    """
    shape = (*count, *clip_shape(settings.frames, settings.size, settings.pixel_format))
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(math.prod(shape))).view(shape)


def _end_with_parent() -> None:
    """End this worker process when the rank that started it is gone, however it ended.

    torch watches the process that forked this one: the forkserver, which itself lives as long as any worker does.
    """
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch


def _iterate(stream: _Stream[Any], pin: bool) -> Iterator[Any]:
    """The batches of `stream`, made by the processes that its settings ask for; a failure is raised here."""
    workers: dict[str, Any] = {}
    if stream.settings.workers:
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vswin_dist.data.loader"])
        workers = {"num_workers": stream.settings.workers, "prefetch_factor": stream.settings.prefetch,
                   "multiprocessing_context": context}
    for batch in DataLoader(stream, batch_size=None, collate_fn=_as_it_is, pin_memory=pin, **workers):
        if isinstance(batch, _Failure):
            raise DataError(batch.message)
        yield batch


class TrainLoader:
    """One rank's micro-batches, from the step that its state names to `last`; accumulation x steps of them.

    The state is the next global step and what the order depends on: nothing of ranks or workers, so that any number
    of them goes on from it, at once and with the batch that would have come.

    Args:
        last: the global step before which it ends.
        pin: hand out batches in pinned memory, for a GPU.
    """

    def __init__(self, manifest: Manifest, settings: DataSettings, plan: Plan, rank: int, world: int, micro_batch: int,
                 last: int, pin: bool = False) -> None:
        self.accumulation = check_batch(plan.global_batch, world, micro_batch)
        self.manifest, self.settings, self.plan, self.last, self.pin = manifest, settings, plan, last, pin
        self.rank, self.world, self.micro_batch = rank, world, micro_batch
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        """The micro-batches from `step` on; `step` goes up with the last one of each."""
        stream = _TrainStream(self.manifest, self.settings, self.plan, range(self.step, self.last), self.rank, self.world,
                              self.micro_batch)
        for number, batch in enumerate(_iterate(stream, self.pin), start=1):
            if number % self.accumulation == 0:
                self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The next step and the plan's identity, as JSON takes them. A step of which a part was handed out is next."""
        return {"step": self.step, "plan": self.plan.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: it belongs to another order of samples.
        """
        mine = self.plan.identity
        if differing := [f"{k} {state['plan'].get(k)!r}, not {v!r}" for k, v in mine.items() if state["plan"].get(k) != v]:
            raise CheckpointError(f"the position in the data is one of another plan: {'; '.join(differing)}. Resume with "
                                  "the data and the settings of the start.")
        self.step = int(state["step"])


def test_batches(manifest: Manifest, base: str, settings: DataSettings, batches: list[list[int]], clips: int,
                 crops: int, shuffle_frames: bool = False, pin: bool = False) -> Iterator[ViewBatch]:
    """The ``clips x crops`` views of the videos in `batches` (lists of sample indices)."""
    return _iterate(_ViewStream(manifest, base, settings, batches, clips, crops, shuffle_frames), pin)
