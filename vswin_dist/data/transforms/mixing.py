"""Mixup and cutmix of a micro-batch on its device, and the loss of hard and of mixed targets.

Partners are neighbours in the order of the global batch: the clips at positions 2i and 2i + 1. What becomes of a pair is
drawn from (seed, step, i), so it does not depend on ranks, world size or micro-batches, which must hold whole pairs.

Shapes: B clips (an even number), P = B / 2 pairs, T frames of H x W pixels, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vswin_dist import randomness
from vswin_dist.config.schema import DataSettings
from vswin_dist.data.transforms.normalise import send
from vswin_dist.errors import ConfigError
from vswin_dist.randomness import Stream


@dataclass(frozen=True)
class PairMix:
    """What becomes of a pair: `own` is each clip's fraction of itself, in pixels and in the target; the rest is its
    partner's, over the whole frame (mixup, `box` None) or in `box` (cutmix: top, bottom, left, right in pixels)."""

    own: float
    box: tuple[int, int, int, int] | None


def mixes(s: DataSettings) -> bool:
    """Return True where clips are mixed at all."""
    return s.mixup > 0 or s.cutmix > 0


def check_pairs(s: DataSettings, micro_batch: int) -> None:
    """Refuse a micro-batch that would cut a pair in two.

    Raises:
        ConfigError: it is odd, and clips are mixed.
    """
    if mixes(s) and micro_batch % 2:
        raise ConfigError(
            f"training.micro_batch={micro_batch} is odd, and data.mixup={s.mixup:g}, data.cutmix={s.cutmix:g} "
            f"mix neighbouring clips: take training.micro_batch={micro_batch + 1}, or another even number"
        )


def draw_pair(s: DataSettings, height: int, width: int, seed: int, step: int, pair: int) -> PairMix:
    """Draw the mix of pair number `pair` of the global batch of `step`.

    The fraction is Beta distributed; a cutmix box has a uniform centre and `sqrt(1 - fraction)` of height and width, and
    what of it lies within the frame decides the fraction (mmaction2's blendings, but drawn for each pair). Where both are
    asked for, each takes half of the pairs.
    """
    rng = randomness.rng(Stream.MIXING, seed, step, pair)
    cut = s.cutmix > 0 and (s.mixup == 0 or rng.random() < 0.5)
    own = float(rng.beta(s.cutmix, s.cutmix) if cut else rng.beta(s.mixup, s.mixup))
    if not cut:
        return PairMix(own, None)
    side = math.sqrt(1 - own)
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    return PairMix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mix(
    clips: Tensor, labels: Tensor, classes: int, s: DataSettings, seed: int, step: int, position: int
) -> tuple[Tensor, Tensor]:
    """Mix a micro-batch as `s` says.

    Args:
        clips: [B, 3, T, H, W], floating point.
        labels: int64 [B].
        position: of the first clip in the global batch of `step`.

    Returns:
        (clips, float32 targets [B, K]); or what was given, where nothing is mixed.
    """
    if not mixes(s):
        return clips, labels
    assert len(clips) % 2 == 0 and position % 2 == 0, "a pair was cut in two"
    drawn = [draw_pair(s, clips.shape[3], clips.shape[4], seed, step, (position + i) // 2) for i in range(0, len(clips), 2)]
    fractions = torch.tensor([[p.own, p.own if p.box is None else 1.0] for p in drawn])
    own, blend = send(fractions, clips.device).unbind(1)  # each [P]
    pairs = clips.unflatten(0, (-1, 2))  # [P, 2, 3, T, H, W]
    mixed = torch.lerp(pairs.flip(1), pairs, blend.to(clips.dtype).view(-1, 1, 1, 1, 1, 1))
    for pair, result, what in zip(pairs, mixed, drawn, strict=True):
        if what.box:
            top, bottom, left, right = what.box
            result[..., top:bottom, left:right] = pair.flip(0)[..., top:bottom, left:right]
    hard = F.one_hot(labels, classes).float().unflatten(0, (-1, 2))  # [P, 2, K]
    weight = own.view(-1, 1, 1)
    return mixed.flatten(0, 1), (weight * hard + (1 - weight) * hard.flip(1)).flatten(0, 1)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Compute the mean loss of `logits` [B, K] in float32, of classes (int64 [B]) or of mixed targets (float [B, K]).

    Smoothing makes of either `(1 - label_smoothing) * target + label_smoothing / K`.
    """
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
