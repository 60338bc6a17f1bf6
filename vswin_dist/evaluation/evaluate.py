"""Multi-view testing over all ranks: each video is scored on exactly one, and none twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vswin_dist.config.schema import DataSettings
from vswin_dist.data.decode import clip_shape
from vswin_dist.data.loader import test_batches
from vswin_dist.data.plan import rank_share
from vswin_dist.data.transforms import normalise
from vswin_dist.evaluation.metrics import Scores, score
from vswin_dist.manifest import Manifest


@dataclass(frozen=True)
class Rank:
    """One process of a training or an evaluation, and the device that it computes on."""

    rank: int
    world: int
    device: torch.device


@dataclass(frozen=True)
class Views:
    """How a video is tested: ``clips x crops`` views, `batch` views in one forward pass."""

    clips: int
    crops: int
    batch: int
    shuffle_frames: bool = False  # a control: what is left of the score when motion is destroyed


@torch.no_grad()  # not inference mode: what ZeRO-3 gathers in it cannot be trained on afterwards
def evaluate(forward: Callable[[Tensor], Tensor], manifest: Manifest, base: str, data: DataSettings, views: Views,
             rank: Rank, dtype: torch.dtype) -> Scores:
    """Score every video of `manifest` with probabilities averaged over its views. Collective over all ranks.

    Every rank makes the same number of forward passes (ZeRO-3 gathers weights in each), on blank views where it has
    no video left.

    Args:
        forward: clips [B, 3, T, H, W] of `dtype` on the rank's device -> logits [B, classes].
        base: URL of the manifest or its folder.

    Returns:
        The scores of all ranks' videos, the same on every rank.
    """
    per_video = views.clips * views.crops
    videos = max(1, views.batch // per_video)
    batches, rounds = rank_share(len(manifest.samples), rank.rank, rank.world, videos)
    loader = test_batches(manifest, base, data, batches, views.clips, views.crops, views.shuffle_frames,
                          pin=rank.device.type == "cuda")
    shape = clip_shape(data.frames, data.size, data.pixel_format)
    found: list[tuple[int, int, np.ndarray]] = []  # sample index, label, probabilities [classes]
    missing: list[tuple[int, str]] = []
    for number in range(rounds):
        clips = torch.empty((0, *shape), dtype=torch.uint8)
        labels, indices = [], []
        if number < len(batches):
            batch = next(loader)
            missing += batch["missing"]
            labels, indices = batch["labels"].tolist(), batch["indices"].tolist()
            if indices:
                clips = batch["views"].flatten(0, 1)
        if blank := videos * per_video - len(clips):
            clips = torch.cat((clips, clips.new_zeros((blank, *shape))))
        logits = torch.cat([forward(normalise(c.to(rank.device, non_blocking=True), data.mean, data.std, dtype)).float()
                            for c in clips.split(views.batch)])
        mean = logits.double().softmax(1).unflatten(0, (videos, per_video)).mean(1).cpu().numpy()
        found += zip(indices, labels, mean, strict=False)
    return _merge(found, missing, manifest, rank)


def _merge(found: list[tuple[int, int, np.ndarray]], missing: list[tuple[int, str]], manifest: Manifest,
           rank: Rank) -> Scores:
    everything = [(found, missing)]
    if rank.world > 1:
        everything = [([], [])] * rank.world
        dist.all_gather_object(everything, (found, missing))
    rows = sorted((row for part, _ in everything for row in part), key=lambda row: row[0])
    lost = sorted(row for _, part in everything for row in part)
    seen = [i for i, _, _ in rows] + [i for i, _ in lost]
    assert sorted(seen) == list(range(len(manifest.samples))), "a video was scored twice or not at all"
    probabilities = np.stack([p for _, _, p in rows]) if rows else np.empty((0, len(manifest.classes)))
    return score(probabilities, np.array([c for _, c, _ in rows], dtype=np.int64),
                 [(manifest.samples[i].key, reason) for i, reason in lost])
