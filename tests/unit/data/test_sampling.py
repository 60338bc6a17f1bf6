"""Frame indices and crop boxes."""

import numpy as np
import pytest

from vswin_dist.data import sampling


def test_dense_training_clips_stay_inside_and_reach_both_ends() -> None:
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(500):
        clip = sampling.train_indices(70, 32, 2, "dense", rng)
        assert np.array_equal(np.diff(clip), np.full(31, 2)) and clip[0] >= 0 and clip[-1] < 70
        starts.add(int(clip[0]))
    assert starts == set(range(7))


def test_a_short_video_goes_round() -> None:
    clip = sampling.train_indices(10, 8, 2, "dense", np.random.default_rng(0))
    assert clip.tolist() == [0, 2, 4, 6, 8, 0, 2, 4]


def test_uniform_takes_one_frame_of_each_segment() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        clip = sampling.train_indices(80, 8, 1, "uniform", rng)
        assert [int(i) // 10 for i in clip] == list(range(8))
    assert sampling.test_indices(80, 8, 1, "uniform", 1)[0].tolist() == [5, 15, 25, 35, 45, 55, 65, 75]


def test_test_clips_are_spread_evenly() -> None:
    clips = sampling.test_indices(300, 32, 2, "dense", 4)
    assert [int(c[0]) for c in clips] == [29, 88, 148, 207]  # middle of each quarter of 237 starts
    assert [int(c[0]) for c in sampling.test_indices(20, 32, 2, "dense", 4)] == [0, 0, 0, 0]


@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240)])
def test_three_crops_cover_the_long_side(height: int, width: int) -> None:
    boxes = sampling.test_boxes(height, width, 224, 224, 3)
    along = [b[1] if width > height else b[0] for b in boxes]
    assert along == [0, 40, 80] and all(b[2:] == (240, 240) for b in boxes)


def test_one_crop_is_the_centre() -> None:
    assert sampling.test_boxes(256, 340, 224, 256, 1) == [(16, 58, 224, 224)]


def test_training_boxes_are_inside_with_area_and_ratio_in_range() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left, h, w = sampling.train_box(240, 320, (0.08, 1.0), (0.75, 1.3333), rng)
        assert top >= 0 and left >= 0 and top + h <= 240 and left + w <= 320
        assert 0.07 < h * w / (240 * 320) <= 1.0 and 0.7 < w / h < 1.4
