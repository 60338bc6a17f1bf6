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

from vswin_dist import randomness
from vswin_dist.config.schema import DataSettings
from vswin_dist.data.plan import Plan
from vswin_dist.data.transforms import pixel_ops as ops
from vswin_dist.data.transforms.normalise import constant
from vswin_dist.randomness import Stream

STRONGEST = 30  # magnitude

Generator = np.random.Generator
Operation = Callable[[Tensor, float, Generator], Tensor]  # clip, fraction of the greatest strength, randomness


def _sign(rng: Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


def _factor(strength: float, rng: Generator) -> float:
    """0.1 to 1.9, 1 for no change."""
    return 1 + _sign(rng) * 0.9 * strength


def _slope(strength: float, rng: Generator) -> float:
    """Up to 0.3; the hyperbolic tangent of the angle, as imgaug has it."""
    return _sign(rng) * math.tanh(0.3 * strength)


def _pixels(side: int, strength: float, rng: Generator) -> int:
    """Up to a third of `side`."""
    return _sign(rng) * round(0.33 * strength * side)


# Each draws from all of them: one more, or another order, changes what every recipe with RandAugment sees.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda clip, strength, rng: clip,
    "autocontrast": lambda clip, strength, rng: ops.autocontrast(clip),
    "equalize": lambda clip, strength, rng: ops.equalize(clip),
    "invert": lambda clip, strength, rng: ops.invert(clip),
    "rotate": lambda clip, strength, rng: ops.rotate(clip, _sign(rng) * 30 * strength),
    "posterize": lambda clip, strength, rng: ops.posterize(clip, 8 - int(6 * strength)),
    "solarize": lambda clip, strength, rng: ops.solarize(clip, 256 - int(256 * strength)),
    "color": lambda clip, strength, rng: ops.color(clip, _factor(strength, rng)),
    "contrast": lambda clip, strength, rng: ops.contrast(clip, _factor(strength, rng)),
    "brightness": lambda clip, strength, rng: ops.brightness(clip, _factor(strength, rng)),
    "sharpness": lambda clip, strength, rng: ops.sharpness(clip, _factor(strength, rng)),
    "shear_x": lambda clip, strength, rng: ops.shear_x(clip, _slope(strength, rng)),
    "shear_y": lambda clip, strength, rng: ops.shear_y(clip, _slope(strength, rng)),
    "translate_x": lambda clip, strength, rng: ops.translate(clip, 0, _pixels(clip.shape[3], strength, rng)),
    "translate_y": lambda clip, strength, rng: ops.translate(clip, _pixels(clip.shape[2], strength, rng), 0),
    "cutout": lambda clip, strength, rng: ops.cutout(clip, 20 / 32 * strength, rng.random(), rng.random()),
    "blur": lambda clip, strength, rng: ops.blur(clip),
    "smooth": lambda clip, strength, rng: ops.smooth(clip),
}


def clip_rng(seed: int, epoch: int, sample: int, copy: int = 0) -> Generator:
    """Make the generator of one clip: of the occurrence of `sample` in `epoch` that has `copy` earlier ones."""
    return randomness.rng(Stream.PIXELS, seed, epoch, sample, copy)


def augmented_by_loader(s: DataSettings, device: torch.device) -> bool:
    """Say whether the loader's processes augment: RGB of CPU ranks. A GPU does it itself, and planes are RGB only there."""
    return s.pixel_format == "rgb" and device.type == "cpu"


def augment_batch(clips: Tensor, s: DataSettings, plan: Plan, step: int, occurrences: Tensor) -> Tensor:
    """`augment` each clip of a batch uint8 [B, 3, T, S, S] of global step `step`; `occurrences` as in `loader.Batch`."""
    if not augmentations(s):
        return clips
    epoch = step // plan.steps_per_epoch
    rngs = (clip_rng(plan.seed, epoch, *plan.sample_and_copy(number)) for number in occurrences.tolist())
    return torch.stack([augment(clip, s, rng) for clip, rng in zip(clips, rngs, strict=True)])


def augment(clip: Tensor, s: DataSettings, rng: Generator) -> Tensor:
    """Augment a clip as the settings say, after crop and flip; on its own device.

    Args:
        clip: uint8 [3, T, S, S], RGB; not changed.
        rng: see `clip_rng`.
    """
    for apply in augmentations(s):
        clip = apply(clip, rng)
    return clip


def augmentations(s: DataSettings) -> list[Callable[[Tensor, Generator], Tensor]]:
    """List what the settings ask for, in its order; one that is not asked for draws no random numbers."""
    found: list[Callable[[Tensor, Generator], Tensor]] = []
    if s.rand_augment_ops:
        found.append(lambda clip, rng: rand_augment(clip, s.rand_augment_ops, s.rand_augment_magnitude, rng))
    if s.erasing:
        found.append(lambda clip, rng: random_erase(clip, s.erasing, s.mean, rng))
    return found


def rand_augment(clip: Tensor, count: int, magnitude: int, rng: Generator) -> Tensor:
    """Apply `count` different operations in random order, each at `magnitude` of 30."""
    names = list(OPERATIONS)
    for i in rng.permutation(len(names))[:count]:
        clip = OPERATIONS[names[i]](clip, magnitude / STRONGEST, rng)
    return clip


def random_erase(clip: Tensor, probability: float, mean: tuple[float, ...], rng: Generator) -> Tensor:
    """Erase a random box of the clip, or leave it as it is."""
    if rng.random() >= probability:
        return clip
    return erase(clip, erased_box(clip.shape[2], clip.shape[3], rng), mean)


def erased_box(height: int, width: int, rng: Generator) -> tuple[int, int, int, int] | None:
    """Choose (top, left, height, width) in pixels: 2% to a third of the frame, height / width log-uniform, 0.3 to 1 / 0.3.

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
    """Fill `box` of every frame with the mean colour: the zero of the normalised clip, as published."""
    if box is None:
        return clip
    top, left, height, width = box
    result = clip.clone()
    colour = constant(mean, clip.device).round().to(torch.uint8)
    result[:, :, top : top + height, left : left + width] = colour.view(3, 1, 1, 1)
    return result
