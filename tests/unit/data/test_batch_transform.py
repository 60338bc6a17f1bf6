"""A batch on its device: the steps that make it what the model takes, one by one, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.data.test_loader import loader
from vswin_dist.config.schema import DataSettings
from vswin_dist.data import loader as feeding
from vswin_dist.data.loader import Batch
from vswin_dist.data.plan import Plan
from vswin_dist.data.transforms.augment import augment, augment_batch, augmented_by_loader, clip_rng
from vswin_dist.data.transforms.batch_transform import BatchTransform
from vswin_dist.data.transforms.mixing import mix
from vswin_dist.data.transforms.normalise import normalise, to_rgb
from vswin_dist.data.transforms.resample import crops_to_rgb
from vswin_dist.data.video.stored_crop import Crop, resized
from vswin_dist.device import Rank

CPU, K, SEED, STEP, SAMPLES = torch.device("cpu"), 5, 3, 7, 13
PLAN = Plan("f", SAMPLES, SEED, 8, repeats=2)  # 3 steps an epoch
AUGMENTED = {"rand_augment_ops": 3, "erasing": 0.5}
MIXED = {"mixup": 0.8, "cutmix": 1.0}


CROPS = [  # each of 2 frames of 16 x 16 pixels, or to be
    Crop(20, 15, 10, 8, 1.0, 0.5),
    Crop(9, 12, 5, 6, 0.0, -0.5, "bt709", flip=True),
    Crop(20, 15, 10, 8, 1.0, 0.5, full_range=True),
    resized(16, True),
]


def batch(pixel_format: str) -> Batch:
    """Four clips of 2 frames of 16 x 16 pixels: two samples, each twice."""
    shapes = {"rgb": (4, 3, 2, 16, 16), "yuv": (4, 2, 16 * 16 * 3 // 2), "native": (2 * sum(c.bytes for c in CROPS),)}
    clips = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shapes[pixel_format], dtype=np.uint8))
    samples = torch.tensor([5, 12, 5, 12])
    copies = torch.tensor([0, 0, 1, 1])
    return {
        "clips": clips,
        "labels": torch.tensor([4, 0, 4, 0]),
        "indices": samples,
        "occurrences": samples + SAMPLES * copies,
        "corrupt": [],
        "crops": CROPS,
    }


def rgb_of(given: Batch, pixel_format: str) -> torch.Tensor:
    return crops_to_rgb(given["clips"], CROPS, 2, 16) if pixel_format == "native" else to_rgb(given["clips"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixel_format", ["rgb", "yuv", "native"])
@pytest.mark.parametrize("options", [{}, AUGMENTED, MIXED, AUGMENTED | MIXED], ids=["plain", "augmented", "mixed", "both"])
def test_it_is_its_steps_one_by_one(options: dict[str, Any], pixel_format: str, dtype: torch.dtype) -> None:
    s = replace(DataSettings(train="", pixel_format=pixel_format, frames=2, size=16), **options)
    given, position = batch(pixel_format), 4
    clips, targets = BatchTransform(s, PLAN, K, CPU, dtype)(given, STEP, position)

    expected = rgb_of(given, pixel_format)
    if pixel_format != "rgb" and "erasing" in options:  # RGB comes augmented from the loader
        keys = [(5, 0), (12, 0), (5, 1), (12, 1)]
        expected = torch.stack(
            [augment(c, s, clip_rng(SEED, 2, sample, copy)) for c, (sample, copy) in zip(expected, keys, strict=True)]
        )
    expected = normalise(expected, s.mean, s.std, dtype)
    wanted = given["labels"]
    if "mixup" in options:
        expected, wanted = mix(expected, wanted, K, s, SEED, STEP, position)
    assert clips.dtype == dtype and clips.shape == (4, 3, 2, 16, 16)
    assert torch.equal(clips, expected) and torch.equal(targets, wanted)
    assert targets.dtype == (torch.float32 if "mixup" in options else torch.int64)


@pytest.mark.parametrize(("options", "step", "position"), [(AUGMENTED, 10, 4), (MIXED, STEP + 1, 4), (MIXED, STEP, 0)])
def test_step_and_position_decide(options: dict[str, Any], step: int, position: int) -> None:
    """Step 10 is in the next epoch."""
    transform = BatchTransform(replace(DataSettings(train="", pixel_format="yuv"), **options), PLAN, K, CPU, torch.float32)
    given = batch("yuv")
    assert not torch.equal(transform(given, step, position)[0], transform(given, STEP, 4)[0])


@pytest.mark.parametrize("pixel_format", ["rgb", "yuv"])
def test_micro_batches_change_nothing(pixel_format: str) -> None:
    s = replace(DataSettings(train="", pixel_format=pixel_format), **AUGMENTED, **MIXED)
    transform, given = BatchTransform(s, PLAN, K, CPU, torch.float32), batch(pixel_format)
    whole = transform(given, STEP, 4)
    names = ("clips", "labels", "indices", "occurrences")
    halves = [
        transform({"corrupt": [], **{k: given[k][i : i + 2] for k in names}}, STEP, 4 + i)  # type: ignore[literal-required, typeddict-item]
        for i in (0, 2)
    ]
    for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts))


def test_a_gpu_augments_what_a_cpus_loader_does() -> None:
    """The same rule on both sides of the way: each clip is augmented once."""
    for form, device, wanted in (
        ("rgb", "cpu", True),
        ("rgb", "cuda", False),
        ("yuv", "cpu", False),
        ("native", "cuda", False),
    ):
        assert augmented_by_loader(DataSettings(train="", pixel_format=form), torch.device(device)) == wanted


@pytest.mark.slow
def test_rgb_that_comes_as_decoded_is_augmented_with_the_same_numbers(motion_shards: Path) -> None:
    """A rank on a GPU gets it so; here its loader's batches are augmented by the transform's own function."""
    options = ("data.rand_augment_ops=3", "data.erasing=0.5")
    ready, plain = loader(motion_shards, *options, last=4), loader(motion_shards, *options, last=4)
    plain.rank = Rank(0, 1, torch.device("cuda"))
    s, plan = plain.settings, plain.plan
    stream = feeding._TrainStream(plain.manifest, s, plan, range(4), plain.rank, plain.micro_batch)
    for number, (one, other) in enumerate(zip(ready, stream, strict=True)):
        made = augment_batch(other["clips"], s, plan, number // 4, other["occurrences"])
        assert torch.equal(one["clips"], made) and not torch.equal(one["clips"], other["clips"])
