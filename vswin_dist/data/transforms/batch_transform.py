"""What happens to a training batch on its device, between the loader and the model."""

from __future__ import annotations

import torch
from torch import Tensor

from vswin_dist.config.schema import DataSettings
from vswin_dist.data.loader import Batch
from vswin_dist.data.plan import Plan
from vswin_dist.data.transforms.augment import augment_batch, augmented_by_loader
from vswin_dist.data.transforms.mixing import mix
from vswin_dist.data.transforms.normalise import normalise, to_rgb
from vswin_dist.data.transforms.resample import crops_to_rgb


class BatchTransform:
    """Make micro-batches into what the model takes: planes to RGB, augmentation, normalisation, mixing.

    What the loader's processes do not augment (see `augment.augmented_by_loader`) is augmented here, as RGB, with the same
    random numbers. Nothing depends on rank, world size or micro-batch.

    Args:
        plan: whose batches they are; its seed is that of augmentation and mixing.
        num_classes: K of mixed targets.
        device: where clips and targets go; a GPU is not waited for.
        dtype: of the clips that come out.
    """

    def __init__(
        self, settings: DataSettings, plan: Plan, num_classes: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.settings, self.plan, self.num_classes = settings, plan, num_classes
        self.device, self.dtype = device, dtype

    def __call__(self, batch: Batch, step: int, position: int) -> tuple[Tensor, Tensor]:
        """Transform one micro-batch of B clips.

        Args:
            step: the global step that it belongs to.
            position: of its first clip in the global batch of `step`.

        Returns:
            (clips [B, 3, T, H, W] of `dtype`, targets): classes int64 [B], or float32 [B, K] where clips are mixed.
        """
        s = self.settings
        clips = batch["clips"].to(self.device, non_blocking=True)
        clips = crops_to_rgb(clips, batch["crops"], s.frames, s.size) if s.pixel_format == "native" else to_rgb(clips)
        if not augmented_by_loader(s, self.device):
            clips = augment_batch(clips, s, self.plan, step, batch["occurrences"])
        clips = normalise(clips, s.mean, s.std, self.dtype)
        labels = batch["labels"].to(self.device, non_blocking=True)
        return mix(clips, labels, self.num_classes, s, self.plan.seed, step, position)
