"""RandAugment, erasing and their randomness."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vswin_dist.config.schema import DataSettings
from vswin_dist.data.transforms import augment, pixel_ops

STRONG = DataSettings(train="", rand_augment_ops=4, rand_augment_magnitude=30, erasing=1.0)


def still(size: int = 48, frames: int = 4) -> Tensor:
    """A clip of one frame repeated: whatever treats all frames alike leaves them equal."""
    frame = np.random.default_rng(0).integers(10, 240, (3, 1, size, size), dtype=np.uint8)
    return torch.from_numpy(frame).repeat(1, frames, 1, 1)


def test_a_clip_depends_on_seed_epoch_sample_and_copy_alone() -> None:
    clip = still()
    before = clip.clone()
    first = augment.augment(clip, STRONG, augment.clip_rng(0, 1, 5))
    assert torch.equal(first, augment.augment(clip, STRONG, augment.clip_rng(0, 1, 5))) and torch.equal(clip, before)
    others = [
        augment.augment(clip, STRONG, augment.clip_rng(*key))
        for key in ((1, 1, 5, 0), (0, 2, 5, 0), (0, 1, 6, 0), (0, 1, 5, 1))
    ]
    assert not any(torch.equal(first, other) for other in others)


def test_nothing_asked_for_is_nothing_done() -> None:
    clip = still()
    assert augment.augment(clip, DataSettings(train=""), augment.clip_rng(0, 0, 0)) is clip


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_every_operation_treats_all_frames_alike(name: str) -> None:
    clip = still()
    for number in range(3):
        found = augment.OPERATIONS[name](clip, 7 / 30, np.random.default_rng(number))
        assert found.shape == clip.shape and found.dtype == torch.uint8
        assert all(torch.equal(found[:, 0], found[:, t]) for t in range(1, 4))
    assert torch.equal(found, clip) == (name == "identity")


def test_strengths_of_the_published_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    """imgaug's RandAugment(m=7): 7 of 30."""
    seen: dict[str, set[float]] = {}
    for name in ("rotate", "posterize", "solarize", "color", "brightness", "shear_x", "cutout"):
        monkeypatch.setattr(
            pixel_ops, name, lambda clip, value, *rest, name=name: seen.setdefault(name, set()).add(round(value, 4)) or clip
        )
    monkeypatch.setattr(
        pixel_ops, "translate", lambda clip, down, right: seen.setdefault("translate", set()).update({down, right}) or clip
    )
    clip = torch.zeros(3, 1, 100, 100, dtype=torch.uint8)
    for number in range(12):
        augment.rand_augment(clip, len(augment.OPERATIONS), 7, np.random.default_rng(number))
    assert seen == {
        "rotate": {-7.0, 7.0},
        "posterize": {7},
        "solarize": {197},
        "color": {0.79, 1.21},
        "brightness": {0.79, 1.21},
        "shear_x": {-0.0699, 0.0699},
        "cutout": {0.1458},
        "translate": {-8, 0, 8},
    }


def test_different_operations_are_drawn_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(
        augment, "OPERATIONS", {n: lambda clip, strength, rng, n=n: done.append(n) or clip for n in "abcdef"}
    )
    orders = set()
    for number in range(300):
        done.clear()
        augment.rand_augment(still(), 4, 7, np.random.default_rng(number))
        assert len(set(done)) == len(done) == 4
        orders.add("".join(done))
    assert len(orders) > 150 and {o[0] for o in orders} == set("abcdef")


def test_erased_boxes_have_the_published_sizes() -> None:
    rng = np.random.default_rng(0)
    boxes = [augment.erased_box(224, 224, rng) for _ in range(2000)]
    areas, ratios = zip(*[(h * w / 224**2, h / w) for _, _, h, w in filter(None, boxes)], strict=True)
    assert 0.019 < min(areas) < 0.03 and 0.31 < max(areas) < 0.336
    assert 0.29 < min(ratios) < 0.32 and 3.1 < max(ratios) < 3.45
    assert all(t >= 0 and x >= 0 and t + h <= 224 and x + w <= 224 for t, x, h, w in filter(None, boxes))


def test_the_same_box_of_every_frame_becomes_the_mean_colour() -> None:
    clip = still()
    found = augment.erase(clip, (4, 6, 10, 20), (123.675, 116.28, 103.53))
    inside = torch.zeros(48, 48, dtype=torch.bool)
    inside[4:14, 6:26] = True
    assert torch.equal(found[..., ~inside], clip[..., ~inside])
    assert found[..., inside].unique(dim=2).view(3, 4).tolist() == [[124] * 4, [116] * 4, [104] * 4]


def test_a_quarter_of_the_clips_is_erased() -> None:
    settings = replace(STRONG, rand_augment_ops=0, erasing=0.25)
    clip = still(16, 1)
    erased = sum(augment.augment(clip, settings, augment.clip_rng(0, 0, i)) is not clip for i in range(1000))
    assert 200 < erased < 300
