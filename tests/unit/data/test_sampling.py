"""Frame indices and crop boxes; the expected ones are worked out by hand from the published pipeline's rules."""

from __future__ import annotations

import numpy as np
import pytest

from vswin_dist.config import load_settings
from vswin_dist.data import sampling
from vswin_dist.manifest import Manifest


def manifest(rule: str) -> Manifest:
    return Manifest("set", "train", ["a"], {}, [], [], sampling=rule)


@pytest.mark.parametrize(
    ("bound", "asked", "used", "warns"),
    [
        ("uniform", "null", "uniform", False),
        ("dense", "null", "dense", False),
        ("uniform", "uniform", "uniform", False),
        ("uniform", "dense", "dense", True),
        ("dense", "uniform", "uniform", True),
    ],
)
def test_the_manifest_decides_unless_the_settings_do(bound: str, asked: str, used: str, warns: bool) -> None:
    settings = load_settings("demo", ["data.train=/shards", f"data.sampling={asked}"]).data
    resolved, warning = sampling.resolve(settings, manifest(bound))
    assert resolved.sampling == used
    assert bool(warning) == warns
    if warns:
        assert f"data.sampling={asked}" in warning and f"says {bound}" in warning and "1 to 2.5 points" in warning


def test_dense_training_clips_stay_inside_and_reach_both_ends() -> None:
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(500):
        clip = sampling.train_indices(70, 32, 2, "dense", rng)
        assert np.array_equal(np.diff(clip), np.full(31, 2)) and clip[0] >= 0 and clip[-1] < 70
        starts.add(int(clip[0]))
    assert starts == set(range(7))  # 70 - 64 + 1: as if a clip took 64 frames, though its last one is the 63rd


@pytest.mark.parametrize("frames", [63, 64])
def test_a_video_no_longer_than_its_clip_starts_at_its_beginning(frames: int) -> None:
    clips = {tuple(sampling.train_indices(frames, 32, 2, "dense", np.random.default_rng(i)).tolist()) for i in range(50)}
    assert clips == {tuple(range(0, 63, 2))}


def test_a_short_video_goes_round() -> None:
    clip = sampling.train_indices(10, 8, 2, "dense", np.random.default_rng(0))
    assert clip.tolist() == [0, 2, 4, 6, 8, 0, 2, 4]
    assert sampling.test_indices(7, 5, 2, "dense", 2)[1].tolist() == [0, 2, 4, 6, 1]


@pytest.mark.parametrize(
    ("frames", "clips", "starts"),
    [
        (300, 4, [29, 88, 148, 207]),  # 237 starts: parts of 59.25, middles 29.625, 88.875, 148.125, 207.375
        (300, 10, [11, 35, 59, 82, 106, 130, 154, 177, 201, 225]),  # parts of 23.7, the first middle 11.85
        (300, 1, [118]),  # 237 / 2 = 118.5
        (64, 4, [0, 0, 0, 0]),  # one start: parts of 0.25, middles 0.125 to 0.875
        (67, 4, [0, 1, 2, 3]),  # four starts
        (66, 4, [0, 1, 1, 2]),  # three: 0.375, 1.125, 1.875, 2.625
        (63, 4, [0, 0, 0, 0]),
        (20, 4, [0, 0, 0, 0]),
    ],
)
def test_dense_test_clips_start_in_the_middle_of_equal_parts(frames: int, clips: int, starts: list[int]) -> None:
    found = sampling.test_indices(frames, 32, 2, "dense", clips)
    assert [int(c[0]) for c in found] == starts
    for clip in found:
        assert clip.tolist() == [(int(clip[0]) + 2 * i) % frames for i in range(32)]


@pytest.mark.parametrize(
    ("frames", "first", "last", "middle"),
    [
        (17, [0, 4, 8, 12], [4, 8, 12, 16], [2, 6, 10, 14]),  # segments of 16 / 4 = 4
        (11, [0, 2, 5, 8], [2, 5, 8, 10], [1, 3, 6, 9]),  # 2.5: edges 0, 2.5 -> 2, 5, 7.5 -> 8, 10 (halves to even)
        (4, [0, 1, 2, 2], [1, 2, 2, 3], [0, 1, 2, 2]),  # 0.75: 0, 0.75 -> 1, 1.5 -> 2, 2.25 -> 2, 3
        (2, [0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]),  # 0.25: 0, 0, 0.5 -> 0, 0.75 -> 1, 1
        (1, [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_uniform_takes_one_frame_of_each_segment(frames: int, first: list[int], last: list[int], middle: list[int]) -> None:
    assert sampling.test_indices(frames, 4, 1, "uniform", 1)[0].tolist() == middle
    rng = np.random.default_rng(0)
    seen = [
        set(column)
        for column in zip(*(sampling.train_indices(frames, 4, 1, "uniform", rng).tolist() for _ in range(200)), strict=True)
    ]
    assert seen == [set(range(a, b + 1)) for a, b in zip(first, last, strict=True)]


def test_several_uniform_clips_share_each_segment() -> None:
    clips = sampling.test_indices(17, 4, 1, "uniform", 2)  # segments of 4: a quarter and three quarters of each
    assert [c.tolist() for c in clips] == [[1, 5, 9, 13], [3, 7, 11, 15]]


def test_indices_are_not_taken_before_the_rule_is_known() -> None:
    with pytest.raises(AssertionError, match="was not resolved"):
        sampling.test_indices(17, 4, 1, None, 1)


def in_resized(boxes: list[tuple[float, ...]], height: int, width: int, tall: int, wide: int) -> list[list[float]]:
    """Boxes (top, left, height, width) in pixels of the frame resized to `tall` x `wide`."""
    scale = np.array([tall / height, wide / width] * 2)
    return (np.array(boxes) * scale).round(6).tolist()


@pytest.mark.parametrize(
    ("height", "width", "tall", "wide", "offsets"),
    [
        (256, 340, 224, 298, [(0, 0), (0, 37), (0, 74)]),  # 340 * 224 / 256 = 297.5, rounded up; step (298 - 224) // 2
        (240, 320, 224, 299, [(0, 0), (0, 37), (0, 74)]),  # 298.67; step 75 // 2: the last pixel is never seen
        (320, 240, 299, 224, [(0, 0), (37, 0), (74, 0)]),
        (224, 224, 224, 224, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_three_crops(height: int, width: int, tall: int, wide: int, offsets: list[tuple[int, int]]) -> None:
    boxes = sampling.test_boxes(height, width, 224, 224, 3)
    assert in_resized(boxes, height, width, tall, wide) == [[top, left, 224, 224] for top, left in offsets]


def test_the_centre_crop_of_a_validation_frame() -> None:
    assert sampling.test_boxes(256, 340, 224, 256, 1) == [(16, 58, 224, 224)]
    boxes = sampling.test_boxes(480, 641, 224, 256, 1)  # resized to 256 x 342 (341.87): offsets 16 and 118 // 2
    assert in_resized(boxes, 480, 641, 256, 342) == [[16, 59, 224, 224]]


def test_five_crops_are_three_the_whole_and_the_centre() -> None:
    left, middle, right, whole, centre = sampling.test_boxes(384, 511, 384, 384, 5)
    assert (left, middle, right) == ((0, 0, 384, 384), (0, 63, 384, 384), (0, 126, 384, 384))
    assert whole == (0, 0, 384, 511) and centre == middle


def test_training_boxes_follow_the_published_distribution() -> None:
    """Area uniform in 0.08 to 1 of the frame, width / height log-uniform, where the box fits."""
    rng = np.random.default_rng(0)
    boxes = np.array([sampling.train_box(400, 400, (0.08, 0.5), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 400).all() and (left + w <= 400).all()
    area, ratio = h * w / 160_000, np.log(w / h) / np.log(4 / 3)
    assert np.allclose(np.quantile(area, [0, 0.25, 0.5, 0.75, 1]), [0.08, 0.185, 0.29, 0.395, 0.5], atol=0.02)
    assert np.allclose(np.quantile(ratio, [0, 0.25, 0.5, 0.75, 1]), [-1, -0.5, 0, 0.5, 1], atol=0.06)
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.05


def test_a_frame_that_no_box_fits_gives_its_centre() -> None:
    box = sampling.train_box(100, 31, (0.9, 1.0), (0.9, 1.1), np.random.default_rng(0))
    assert box == (34, 0, 31, 31)
