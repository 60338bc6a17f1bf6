"""Batches of clips, read from the shards in the order of the plan.

Worker processes are started by forkserver (s3fs does not survive a fork). Worker w of W makes the batches w, w + W,
w + 2W, ... of its rank, so it knows what it will need and has the bytes on the way before it decodes. Memory is bounded:
`data.prefetch` decoded batches and what `shard_reader.read_ahead` states for each worker. What a sample looks like depends
on (seed, epoch, sample, copy) alone.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.spawn
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, NotRequired, TypedDict, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vswin_dist import randomness, storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.data import batch_memory
from vswin_dist.data.batch_memory import BatchMemory
from vswin_dist.data.clips import info_of, train_clip, video_views, view_format
from vswin_dist.data.flip_labels import flipped_classes
from vswin_dist.data.plan import Occurrence, Plan, check_batch
from vswin_dist.data.quarantine import CorruptSample
from vswin_dist.data.shard_reader import Members, read_ahead
from vswin_dist.data.transforms.augment import augment, augmented_by_loader, clip_rng
from vswin_dist.data.video.decode import clip_shape
from vswin_dist.data.video.stored_crop import Crop
from vswin_dist.device import Rank, place_sockets
from vswin_dist.errors import CheckpointError, DataError, StorageError, VswinError
from vswin_dist.manifest import Manifest
from vswin_dist.randomness import Stream

SUBSTITUTES = 32  # tried for one position

T = TypeVar("T")


class Batch(TypedDict):
    """clips uint8 [B, 3, T, S, S]; or planes [B, T, S * S * 3 / 2] where data.pixel_format is yuv; or uint8 [N], one clip
    after the other as `crops` says, where it is native. labels int64 [B]; indices int64 [B], of the samples in the manifest.

    occurrences int64 [B] are what random streams of the model are keyed by: `Plan.occurrence_number` of the sample that
    the plan had put there, whatever replaces it. `corrupt` are those that did not decode. `bytes` were read for those that
    the plan had put there.
    """

    clips: Tensor
    labels: Tensor
    indices: Tensor
    occurrences: Tensor
    corrupt: list[CorruptSample]
    bytes: int
    crops: NotRequired[list[Crop]]


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

    error: VswinError


class _BatchStream(IterableDataset[Any], ABC, Generic[T]):
    """The batches of one rank; in a worker process, that worker's part of them."""

    def __init__(self, manifest: Manifest, base: str, settings: DataSettings) -> None:
        self.manifest, self.base, self.settings = manifest, base, settings
        self.environment = storage.environment()
        self.ring = uuid.uuid4().hex
        self.memory = BatchMemory(self.ring, None, 0)

    @abstractmethod
    def batches(self) -> Iterator[list[T]]:
        """Give all batches of the rank, in order."""

    @abstractmethod
    def index(self, item: T) -> int:
        """Tell the sample that `item` stands for."""

    @abstractmethod
    def collate(self, items: list[tuple[T, Future[bytes]]], members: Members) -> Any:
        """Make one batch of its items and their bytes."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker:
            threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
            os.environ.update(self.environment)
            # those that are made and not yet taken, the one that is at work, and the one that the model has
            self.memory = BatchMemory(self.ring, worker.id, self.settings.prefetch + 2)
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = itertools.islice(self.batches(), first, None, every)
        members = Members(self.manifest, self.base, self.settings.cache_gb)
        samples = self.manifest.samples
        ahead = read_ahead(
            mine, lambda item: members.read(self.index(item)), lambda item: samples.value("size", self.index(item))
        )
        try:
            for items in ahead:
                yield self.collate(items, members)
        except (DataError, StorageError) as error:
            yield _Failure(error)
        finally:
            ahead.close()  # type: ignore[attr-defined]
            members.close()


class _Clip(NamedTuple):
    """One clip: its class, the sample that it shows, what did not decode before it; and where pixel_format is
    native, what its planes are and how many bytes they take."""

    label: int
    sample: int
    corrupt: list[CorruptSample]
    crop: Crop | None
    bytes: int


class _TrainStream(_BatchStream[Occurrence]):
    """A rank's micro-batches of the global steps `steps`."""

    def __init__(
        self, manifest: Manifest, settings: DataSettings, plan: Plan, steps: range, rank: Rank, micro_batch: int
    ) -> None:
        super().__init__(manifest, settings.train, settings)
        self.plan, self.steps, self.rank, self.micro_batch = plan, steps, rank, micro_batch
        self.flipped = flipped_classes(manifest.classes, settings.flip_labels)

    def batches(self) -> Iterator[list[Occurrence]]:
        return self.plan.micro_batches(self.steps, self.rank.rank, self.rank.world_size, self.micro_batch)

    def index(self, item: Occurrence) -> int:
        return item.sample

    def collate(self, items: list[tuple[Occurrence, Future[bytes]]], members: Members) -> Batch:
        s = self.settings
        native, augments = s.pixel_format == "native", augmented_by_loader(s, self.rank.device)
        shape = clip_shape(s.frames, s.size, s.pixel_format)
        room = self.memory.take((len(items) * shape[0],) if native else (len(items), *shape))
        made: list[_Clip] = []
        for number, (planned, data) in enumerate(items):
            used = sum(clip.bytes for clip in made)
            out = room.tensor[used : used + shape[0]] if native else room.tensor[number]
            made.append(self.clip(planned, data.result(), members, out))
            if augments:
                pixels = clip_rng(self.plan.seed, planned.epoch, planned.sample, planned.copy)
                out.copy_(augment(out, s, pixels))
        batch: Batch = {
            "clips": room.part(sum(clip.bytes for clip in made) if native else None),
            "labels": torch.tensor([clip.label for clip in made]),
            "indices": torch.tensor([clip.sample for clip in made]),
            "occurrences": torch.tensor([self.plan.occurrence_number(planned) for planned, _ in items]),
            "corrupt": [sample for clip in made for sample in clip.corrupt],
            "bytes": sum(len(data.result()) for _, data in items),
        }
        return batch | {"crops": [clip.crop for clip in made if clip.crop]} if native else batch

    def clip(self, planned: Occurrence, data: bytes, members: Members, out: Tensor) -> _Clip:
        """Write the clip to `out`.

        Raises:
            DataError: no substitute decodes either.
        """
        step, position, epoch, index, copy = planned
        seed = self.plan.seed
        rng = randomness.rng(Stream.AUGMENTATION, seed, epoch, index, *([copy] if copy else []))
        substitutes = None
        failed: list[tuple[int, str]] = []
        for _ in range(SUBSTITUTES):
            try:
                sample = self.manifest.samples.row(index)
                flipped, colours = self.flipped[sample.class_id], self.manifest.colours
                label, crop = train_clip(data, sample, self.settings, flipped, rng, out, colours)
                corrupt = [CorruptSample(step, position, epoch, i, why, index) for i, why in failed]
                return _Clip(label, index, corrupt, crop, self.settings.frames * crop.bytes if crop else 0)
            except DataError as error:
                failed.append((index, str(error)))
            if substitutes is None:  # in a stream of their own, which also augments them
                substitutes = rng = randomness.rng(Stream.SUBSTITUTION, seed, epoch, step, position)
            index = self.plan.any_sample(substitutes)
            data = members.read(index)
        raise DataError(
            f"step {step}, position {position}: {SUBSTITUTES} videos in a row do not decode; the last: {failed[-1][1]}"
        )


class _ViewStream(_BatchStream[int]):
    """The test views of `lists` of sample indices. Evaluation never substitutes: what cannot be read is missing."""

    def __init__(
        self,
        manifest: Manifest,
        base: str,
        settings: DataSettings,
        lists: Sequence[Sequence[int]],
        clips: int,
        crops: int,
        shuffle_frames: bool,
    ) -> None:
        super().__init__(manifest, base, settings)
        self.lists, self.clips, self.crops, self.shuffle_frames = lists, clips, crops, shuffle_frames

    def batches(self) -> Iterator[list[int]]:
        return map(list, self.lists)

    def index(self, item: int) -> int:
        return item

    def collate(self, items: list[tuple[int, Future[bytes]]], members: Members) -> ViewBatch:
        shape = clip_shape(self.settings.frames, self.settings.size, view_format(self.settings))
        room = self.memory.take((len(items), self.clips * self.crops, *shape))
        indices: list[int] = []
        missing: list[tuple[int, str]] = []
        for index, data in items:
            sample, found = self.manifest.samples.row(index), room.tensor[len(indices)]
            try:
                video = info_of(sample, self.manifest.colours)
                video_views(data.result(), video, self.settings, self.clips, self.crops, found)
            except DataError as error:
                missing.append((index, str(error)))
                continue
            if self.shuffle_frames:
                order = randomness.rng(Stream.AUGMENTATION, index).permutation(self.settings.frames)
                found.copy_(found.index_select(2 if found.ndim == 5 else 1, torch.from_numpy(order)))
            indices.append(index)
        labels = [self.manifest.samples.value("class_id", i) for i in indices]
        return {
            "views": room.part(len(indices)),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "indices": torch.tensor(indices, dtype=torch.int64),
            "missing": missing,
        }


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


def _without_main_module() -> AbstractContextManager[Any]:
    """Start processes without the program's main module: in a rank it is Ray's worker, whose import takes each a second."""
    prepare = multiprocessing.spawn.get_preparation_data
    return patch.object(
        multiprocessing.spawn,
        "get_preparation_data",
        lambda name: {k: v for k, v in prepare(name).items() if not k.startswith("init_main_from")},
    )


def _iterate(stream: _BatchStream[Any], pin: bool) -> Iterator[Any]:
    """Give the batches of `stream`, made by the processes that its settings ask for; a failure is raised here."""
    workers: dict[str, Any] = {}
    if stream.settings.workers:
        place_sockets()
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vswin_dist.data.loader"])
        workers = {
            "num_workers": stream.settings.workers,
            "prefetch_factor": stream.settings.prefetch,
            "multiprocessing_context": context,
        }
    batch_memory.open_ring(stream.ring)
    try:
        loader = DataLoader(stream, batch_size=None, collate_fn=_as_it_is, pin_memory=pin, **workers)
        with _without_main_module():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    finally:
        batch_memory.close_ring(stream.ring)


class TrainLoader:
    """One rank's micro-batches, from the step that its state names to `last`; accumulation x steps of them.

    The state is the next global step and what the order depends on: nothing of ranks or workers, so that any number
    of them resumes from it, at once and with the batch that would have come.

    Args:
        rank: whose batches they are; in pinned memory where its device is a GPU.
        last: the global step before which it ends.

    Raises:
        ConfigError: the global batch does not divide by world size and micro-batch.
    """

    def __init__(
        self, manifest: Manifest, settings: DataSettings, plan: Plan, rank: Rank, micro_batch: int, last: int
    ) -> None:
        self.accumulation = check_batch(plan.global_batch, rank.world_size, micro_batch)
        self.manifest, self.settings, self.plan = manifest, settings, plan
        self.rank, self.micro_batch, self.last = rank, micro_batch, last
        self.step = 0
        self.bytes_read = 0  # for the batches that were given

    @property
    def metrics(self) -> dict[str, float]:
        """How many bytes this rank has read since it began."""
        return {"data/bytes_read": float(self.bytes_read)}

    def __iter__(self) -> Iterator[Batch]:
        """Give the micro-batches from `step` on; `step` goes up with the last one of each."""
        steps = range(self.step, self.last)
        stream = _TrainStream(self.manifest, self.settings, self.plan, steps, self.rank, self.micro_batch)
        for number, batch in enumerate(_iterate(stream, self.rank.pins), start=1):
            if number % self.accumulation == 0:
                self.step += 1
            self.bytes_read += batch["bytes"]
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Give the next step and the plan's identity, for JSON. A step of which a part was handed out is next."""
        return {"step": self.step, "plan": self.plan.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`.

        Raises:
            CheckpointError: it belongs to another order of samples.
        """
        mine = self.plan.identity
        if differing := [f"{k} {state['plan'].get(k)!r}, not {v!r}" for k, v in mine.items() if state["plan"].get(k) != v]:
            raise CheckpointError(
                f"the position in the data is one of another plan: {'; '.join(differing)}. Resume with "
                "the data and the settings of the start."
            )
        self.step = int(state["step"])


def test_batches(
    manifest: Manifest,
    base: str,
    settings: DataSettings,
    batches: Sequence[Sequence[int]],
    clips: int,
    crops: int,
    shuffle_frames: bool = False,
    pin: bool = False,
) -> Iterator[ViewBatch]:
    """Give the `clips` x `crops` views of the videos in `batches` (lists of sample indices)."""
    return _iterate(_ViewStream(manifest, base, settings, batches, clips, crops, shuffle_frames), pin)
