"""Batches of clips, read from the shards in the order of the plan.

Members are fetched by offset through the manifest, checked, decoded and augmented in worker processes started by
forkserver (s3fs does not survive a fork), several batches ahead. What a sample looks like depends on
(seed, epoch, sample index) alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vswin_dist import storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.data import sampling
from vswin_dist.data.decode import View, decode_views
from vswin_dist.data.plan import Plan
from vswin_dist.errors import DataError
from vswin_dist.manifest import Manifest, shard_url

AUGMENTATION = 1  # first word of the random streams of this module


class Batch(TypedDict):
    """clips uint8 [B, 3, T, S, S], or planes [B, T, S * S * 3 / 2] where data.pixel_format is yuv; labels int64 [B];
    indices int64 [B], the samples' numbers in the manifest."""

    clips: Tensor
    labels: Tensor
    indices: Tensor


def fetch_member(manifest: Manifest, base: str, index: int) -> bytes:
    """The bytes of sample `index`'s video, checked against the manifest.

    Raises:
        DataError: the shard is cut short, or the bytes are not those that were packed.
    """
    sample = manifest.samples[index]
    url = shard_url(base, manifest.shards[sample.shard])
    data = storage.read_range(url, sample.offset, sample.size)
    if zlib.crc32(data) != sample.crc32:
        raise DataError(f"{url}: sample {sample.key!r} at offset {sample.offset} is damaged (crc32 differs from the "
                        "manifest's). Run data-prep verify.")
    return data


class TrainClips(Dataset[tuple[Tensor, int, int]]):
    """(epoch, sample index) -> (augmented clip uint8 [3, T, size, size], class id, sample index)."""

    def __init__(self, manifest: Manifest, base: str, settings: DataSettings, seed: int) -> None:
        self.manifest, self.base, self.settings, self.seed = manifest, base, settings, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = item
        s, sample = self.settings, self.manifest.samples[index]
        rng = np.random.default_rng([AUGMENTATION, self.seed, epoch, index])
        indices = sampling.train_indices(sample.frames, s.frames, s.stride, s.sampling, rng)
        flip = bool(rng.random() < s.flip)
        box = sampling.train_box(sample.height, sample.width, s.crop_scale, s.crop_ratio, rng)
        clips = decode_views(fetch_member(self.manifest, self.base, index), [View(indices, box)], frames=sample.frames,
                             width=sample.width, height=sample.height, size=s.size, flip=flip,
                             pixel_format=s.pixel_format, name=sample.key)
        return clips[0], sample.class_id, index


class ViewBatch(TypedDict):
    """views uint8 [B, V, 3, T, S, S], or planes [B, V, T, S * S * 3 / 2]; labels, indices int64 [B]; missing: (sample
    index, reason) of what failed."""

    views: Tensor
    labels: Tensor
    indices: Tensor
    missing: list[tuple[int, str]]


class TestClips(Dataset[tuple[Tensor | str, int, int]]):
    """Sample index -> (views uint8 [V, 3, T, size, size], or why there are none; class id; sample index)."""

    __test__ = False  # not a test case

    def __init__(self, manifest: Manifest, base: str, settings: DataSettings, clips: int, crops: int,
                 shuffle_frames: bool = False) -> None:
        self.manifest, self.base, self.settings = manifest, base, settings
        self.clips, self.crops, self.shuffle_frames = clips, crops, shuffle_frames

    def __getitem__(self, index: int) -> tuple[Tensor | str, int, int]:
        sample = self.manifest.samples[index]
        try:
            data = fetch_member(self.manifest, self.base, index)
            views = video_views(data, sample.frames, sample.width, sample.height, sample.key, self.settings, self.clips,
                                self.crops)
        except (DataError, FileNotFoundError) as error:  # evaluation never substitutes: the video is missing
            return str(error), sample.class_id, index
        if self.shuffle_frames:
            order = np.random.default_rng([AUGMENTATION, index]).permutation(self.settings.frames)
            views = views.index_select(2 if views.ndim == 5 else 1, torch.from_numpy(order))
        return views, sample.class_id, index


def video_views(data: bytes, frames: int, width: int, height: int, name: str, s: DataSettings, clips: int,
                crops: int) -> Tensor:
    """The test views of one video, uint8 [clips * crops, 3, T, size, size] or planes as in `Batch`; clip by clip.

    Several crops are cut at full short side (`size` pixels of it, as published); a single one is the centre
    ``size / short_side`` of the frame.
    """
    times = sampling.test_indices(frames, s.frames, s.stride, s.sampling, clips)
    boxes = sampling.test_boxes(height, width, s.size, s.size if crops > 1 else s.short_side, crops)
    return decode_views(data, [View(t, box) for t in times for box in boxes], frames=frames, width=width, height=height,
                        size=s.size, pixel_format=s.pixel_format, name=name)


def _collate(items: list[tuple[Tensor, int, int]]) -> Batch:
    clips, labels, indices = zip(*items, strict=True)
    return {"clips": torch.stack(clips), "labels": torch.tensor(labels), "indices": torch.tensor(indices)}


def _collate_views(items: list[tuple[Tensor | str, int, int]]) -> ViewBatch:
    whole = [item for item in items if isinstance(item[0], Tensor)]
    views = torch.stack([v for v, _, _ in whole if isinstance(v, Tensor)]) if whole else torch.empty(0)
    return {"views": views, "labels": torch.tensor([c for _, c, _ in whole], dtype=torch.int64),
            "indices": torch.tensor([i for _, _, i in whole], dtype=torch.int64),
            "missing": [(i, v) for v, _, i in items if isinstance(v, str)]}


def _loader(dataset: Dataset, batches: Iterable[list[Any]], collate: Callable[[list[Any]], Any],
            settings: DataSettings, pin: bool) -> Iterator[Any]:
    workers: dict[str, Any] = {}
    if settings.workers:
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vswin_dist.data.loader"])
        workers = {"num_workers": settings.workers, "prefetch_factor": settings.prefetch,
                   "multiprocessing_context": context}
    return iter(DataLoader(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=pin, **workers))


class _Steps:
    """The batch sampler of one rank: its micro-batches from one step to another, across epochs."""

    def __init__(self, plan: Plan, steps: range, rank: int, world: int, micro_batch: int) -> None:
        self.plan, self.steps, self.rank, self.world, self.micro_batch = plan, steps, rank, world, micro_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.plan.micro_batches(self.steps, self.rank, self.world, self.micro_batch)


def train_batches(manifest: Manifest, settings: DataSettings, plan: Plan, steps: range, rank: int, world: int,
                  micro_batch: int, pin: bool = False) -> Iterator[Batch]:
    """`rank`'s micro-batches of the global steps `steps`, in order: accumulation x len(steps) of them."""
    dataset = TrainClips(manifest, settings.train, settings, plan.seed)
    return _loader(dataset, _Steps(plan, steps, rank, world, micro_batch), _collate, settings, pin)


def test_batches(manifest: Manifest, base: str, settings: DataSettings, batches: list[list[int]], clips: int,
                 crops: int, shuffle_frames: bool = False, pin: bool = False) -> Iterator[ViewBatch]:
    """The ``clips x crops`` views of the videos in `batches` (lists of sample indices)."""
    dataset = TestClips(manifest, base, settings, clips, crops, shuffle_frames)
    return _loader(dataset, batches, _collate_views, settings, pin)
