"""Multi-view testing over all ranks: each video is scored on exactly one, and none twice.

A video has the same scores to the last digit on any rank: all views of `Views.videos` neighbours in the manifest make
up a batch of one shape, in which each has its place. Blank views stand for what is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vswin_dist.config.schema import DataSettings
from vswin_dist.data.clips import view_format
from vswin_dist.data.loader import ViewBatch, test_batches
from vswin_dist.data.plan import Batches, evaluation_batches
from vswin_dist.data.transforms.normalise import normalise
from vswin_dist.data.video.decode import clip_shape
from vswin_dist.device import Rank
from vswin_dist.evaluation.predictions import Found, Identity
from vswin_dist.manifest import Manifest


@dataclass(frozen=True)
class Views:
    """How a video is tested: `clips x crops` views, `batch` views in one forward pass."""

    clips: int
    crops: int
    batch: int
    shuffle_frames: bool = False  # a control: what is left of the score when motion is destroyed

    @property
    def of_a_video(self) -> int:
        """The views of one video."""
        return self.clips * self.crops

    @property
    def videos(self) -> int:
        """The videos that are scored together: those whose views fill a forward pass, at least one."""
        return max(1, self.batch // self.of_a_video)

    def identity(self, manifest: Manifest, *, weights: str, card: str, device: str) -> Identity:
        """Say what the scores of the videos of `manifest` depend on; see `Identity` for the others."""
        return Identity(
            weights=weights,
            card=card,
            fingerprint=manifest.fingerprint,
            dataset=f"{manifest.name} {manifest.split}",
            classes=manifest.classes,
            clips=self.clips,
            crops=self.crops,
            batch=self.batch,
            shuffle_frames=self.shuffle_frames,
            device=device,
            torch=torch.__version__,
        )


@dataclass(frozen=True)
class Scorer:
    """A model, and the videos that it scores.

    Args:
        forward: clips [B, 3, T, H, W] of `dtype` on the device -> logits [B, classes].
        base: URL of the manifest or its folder.
    """

    forward: Callable[[Tensor], Tensor]
    manifest: Manifest
    base: str
    data: DataSettings
    views: Views
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()  # not inference mode: what ZeRO-3 gathers in it cannot be trained on afterwards
    def rounds(self, batches: Batches, rounds: int) -> Iterator[Found]:
        """Give what was found of each batch; an empty batch in the rounds after the last, with equal forward passes."""
        v = self.views
        pin = self.device.type == "cuda"
        loader = test_batches(self.manifest, self.base, self.data, batches, v.clips, v.crops, v.shuffle_frames, pin=pin)
        shape = (v.of_a_video, *clip_shape(self.data.frames, self.data.size, view_format(self.data)))
        for number in range(rounds):
            batch = next(loader) if number < len(batches) else None
            indices = batch["indices"].tolist() if batch else []
            places = [i - batches[number].start for i in indices]
            probabilities = self._probabilities(_in_place(batch, places, (v.videos, *shape)))[places].cpu().numpy()
            labels = batch["labels"].tolist() if batch else []
            rows = zip(indices, labels, probabilities, strict=True)
            yield Found.of(rows, batch["missing"] if batch else [], len(self.manifest.classes))

    def _probabilities(self, views: Tensor) -> Tensor:
        """Average over the views of each video: [videos, V, ...] -> float64 [videos, classes]."""
        mean, std = self.data.mean, self.data.std
        logits = [
            self.forward(normalise(c.to(self.device, non_blocking=True), mean, std, self.dtype)).float()
            for c in views.flatten(0, 1).split(self.views.batch)
        ]
        mean_over_views: Tensor = torch.cat(logits).double().softmax(1).unflatten(0, views.shape[:2]).mean(1)
        return mean_over_views


def evaluate(
    forward: Callable[[Tensor], Tensor],
    manifest: Manifest,
    base: str,
    data: DataSettings,
    views: Views,
    rank: Rank,
    dtype: torch.dtype,
    beat: Callable[[], None] = lambda: None,
) -> Found:
    """Classify every video of `manifest` by the mean of its views' probabilities. Collective over all ranks.

    Every rank makes the same number of forward passes (ZeRO-3 gathers weights in each), on blank views where it has
    no video left.

    Args:
        forward, base: see `Scorer`.
        beat: called as each round begins, and the gathering of what they found.

    Returns:
        What all ranks found, the same on every rank; `Found.scores` scores it.
    """
    scorer = Scorer(forward, manifest, base, data, views, rank.device, dtype)
    batches, rounds = evaluation_batches(len(manifest.samples), rank.rank, rank.world_size, views.videos)
    parts = []
    beat()
    for found in scorer.rounds(batches, rounds):
        parts.append(found)
        beat()
    everything = rank.gather(Found.joined(parts, len(manifest.classes)))
    found = Found.joined(everything, len(manifest.classes))
    found.check(manifest)
    return found


def _in_place(batch: ViewBatch | None, places: list[int], shape: tuple[int, ...]) -> Tensor:
    """Put the views of each video at its place of a batch of `shape`; the others are blank."""
    if batch and places == list(range(shape[0])):
        return batch["views"]
    room = torch.zeros(shape, dtype=torch.uint8)
    if batch and places:
        room[places] = batch["views"]
    return room
