"""Augmentation of one training clip after the crop: RandAugment and random erasing, alike for all its frames.

RandAugment is the one that the published Something-Something V2 recipe runs (n = 4, m = 7, imgaug 0.4): 18 operations,
of which n different ones are applied in random order, with strengths rising linearly up to m = 30. m = 7 is therefore
mild: 7 degrees, factors of 0.79 and 1.21. Two things that imgaug puts before them are left out: a horizontal flip of
every second clip, which turns "left to right" into its opposite without telling the label (`data.flip` and
`data.flip_labels` do it rightly), and a crop of up to m / 224 at each side, which the random resized crop covers.

A clip of 32 x 224 x 224 takes 15.0 ms on one thread of the 2-core development machine with n = 4, m = 7 and erasing
at 0.25 (mean of 200 clips). By operation (median of 7, in ms): sharpness 9.7, blur 6.9, smooth 5.7, color 5.5, shears
and rotation 4.7 to 5.2, contrast 4.5, equalize 4.2, autocontrast, brightness and solarize 2.3, the others 0.3 at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vswin_dist.config.schema import DataSettings
from vswin_dist.data import pixel_ops as ops
from vswin_dist.data.plan import Plan
from vswin_dist.data.transforms import constant

PIXELS = 4  # first word of the random streams of this module
STRONGEST = 30  # magnitude

Generator = np.random.Generator
Operation = Callable[[Tensor, float, Generator], Tensor]  # clip, share of the greatest strength, randomness


def _sign(rng: Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _factor(share: float, rng: Generator) -> float:
    """0.1 to 1.9, 1 for no change."""
    return 1 + _sign(rng) * 0.9 * share


def _slope(share: float, rng: Generator) -> float:
    """Up to 0.3; the hyperbolic tangent of the angle, as imgaug has it."""
    return _sign(rng) * math.tanh(0.3 * share)


def _pixels(side: int, share: float, rng: Generator) -> int:
    """Up to a third of `side`."""
    return _sign(rng) * round(0.33 * share * side)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda clip, share, rng: clip,
    "autocontrast": lambda clip, share, rng: ops.autocontrast(clip),
    "equalize": lambda clip, share, rng: ops.equalize(clip),
    "invert": lambda clip, share, rng: ops.invert(clip),
    "rotate": lambda clip, share, rng: ops.rotate(clip, _sign(rng) * 30 * share),
    "posterize": lambda clip, share, rng: ops.posterize(clip, 8 - int(6 * share)),
    "solarize": lambda clip, share, rng: ops.solarize(clip, 256 - int(256 * share)),
    "color": lambda clip, share, rng: ops.color(clip, _factor(share, rng)),
    "contrast": lambda clip, share, rng: ops.contrast(clip, _factor(share, rng)),
    "brightness": lambda clip, share, rng: ops.brightness(clip, _factor(share, rng)),
    "sharpness": lambda clip, share, rng: ops.sharpness(clip, _factor(share, rng)),
    "shear_x": lambda clip, share, rng: ops.shear_x(clip, _slope(share, rng)),
    "shear_y": lambda clip, share, rng: ops.shear_y(clip, _slope(share, rng)),
    "translate_x": lambda clip, share, rng: ops.translate(clip, 0, _pixels(clip.shape[3], share, rng)),
    "translate_y": lambda clip, share, rng: ops.translate(clip, _pixels(clip.shape[2], share, rng), 0),
    "cutout": lambda clip, share, rng: ops.cutout(clip, 20 / 32 * share, rng.random(), rng.random()),
    "blur": lambda clip, share, rng: ops.blur(clip),
    "smooth": lambda clip, share, rng: ops.smooth(clip),
}


def clip_rng(seed: int, epoch: int, index: int, repeat: int = 0) -> Generator:
    """The randomness of one clip: of sample `index` in `epoch`, the `repeat`-th time that it stands in its batch."""
    return np.random.default_rng([PIXELS, seed, epoch, index, repeat])


def augment_draws(clips: Tensor, s: DataSettings, plan: Plan, step: int, draws: Tensor) -> Tensor:
    """`augment` of each clip of a batch uint8 [B, 3, T, S, S] of global step `step`; `draws` as in `loader.Batch`."""
    if not (s.rand_augment_ops or s.erasing):
        return clips
    epoch = step // plan.steps_per_epoch
    rngs = (clip_rng(plan.seed, epoch, *divmod(draw, plan.num_samples)[::-1]) for draw in draws.tolist())
    return torch.stack([augment(clip, s, rng) for clip, rng in zip(clips, rngs, strict=True)])


def augment(clip: Tensor, s: DataSettings, rng: Generator) -> Tensor:
    """`clip` as the settings say, after crop and flip; on its own device.

    Args:
        clip: uint8 [3, T, S, S], RGB; not changed.
        rng: see `clip_rng`.
    """
    if s.rand_augment_ops:
        clip = rand_augment(clip, s.rand_augment_ops, s.rand_augment_magnitude, rng)
    if s.erasing and rng.random() < s.erasing:
        clip = erase(clip, erased_box(clip.shape[2], clip.shape[3], rng), s.mean)
    return clip


def rand_augment(clip: Tensor, count: int, magnitude: int, rng: Generator) -> Tensor:
    """`count` different operations in random order, each at `magnitude` of 30."""
    names = list(OPERATIONS)
    for i in rng.permutation(len(names))[:count]:
        clip = OPERATIONS[names[i]](clip, magnitude / STRONGEST, rng)
    return clip


def erased_box(height: int, width: int, rng: Generator) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) in pixels: 2% to a third of the frame, height / width log-uniform in 0.3 to 1 / 0.3.

    None after ten boxes that did not fit. As timm's RandomErasing, which the published recipe uses.
    """
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


def erase(clip: Tensor, box: tuple[int, int, int, int] | None, mean: tuple[float, ...]) -> Tensor:
    """`clip` with the mean colour in `box` of every frame: the zero of the normalised clip, as published."""
    if box is None:
        return clip
    top, left, height, width = box
    result = clip.clone()
    colour = constant(mean, clip.device).round().to(torch.uint8)
    result[:, :, top:top + height, left:left + width] = colour.view(3, 1, 1, 1)
    return result
