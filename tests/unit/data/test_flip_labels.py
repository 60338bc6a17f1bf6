"""What becomes of a class when its clips are flipped, with real label lists where they are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vswin_dist.data.flip_labels import flipped_classes

LABELS = Path(os.environ.get("VSWIN_DATA", Path(__file__).parents[4] / "shared" / "data")) / "labels"


def lines(name: str) -> list[str]:
    if not (LABELS / name).exists():
        pytest.skip(f"no label lists at {LABELS}: set VSWIN_DATA")
    return (LABELS / name).read_text().splitlines()


def changed(classes: list[str]) -> dict[str, str | None]:
    return {
        classes[i]: None if j is None else classes[j] for i, j in enumerate(flipped_classes(classes, "mirror")) if i != j
    }


def test_keep_leaves_every_class() -> None:
    assert flipped_classes(["left", "right", "up"], "keep") == [0, 1, 2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("swipe_left", "swipe_right"),
        ("SwipeLeft", "SwipeRight"),
        ("Moving LEFT", "Moving RIGHT"),
        ("left2", "right2"),
        ("draw_circle_CW", "draw_circle_CCW"),
        ("clockwise", "counter-clockwise"),
        ("turn clockwise", "turn anticlockwise"),
        ("turn clockwise", "turn anti clockwise"),
        ("Pushing it from left to right", "Pushing it from right to left"),
    ],
)
def test_words_of_direction_have_counterparts(one: str, other: str) -> None:
    assert flipped_classes(["clap", one, other], "mirror") == [0, 2, 1]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["swipe left", "up"], [None, 1]),
        (["putting it right", "upright", "copyright", "leftovers", "Rightly"], [None, 1, 2, 3, 4]),
        (["turn cw", "turn clockwise", "turn ccw"], [None, None, None]),  # which one would it be?
        (["left and right", "right and left", "wave"], [1, 0, 2]),
    ],
)
def test_without_a_counterpart_it_is_not_flipped(classes: list[str], expected: list[int | None]) -> None:
    assert flipped_classes(classes, "mirror") == expected


def test_something_something_v2() -> None:
    """The pairs 86-87, 93-94 and 166-167, as in mmaction2's flip_label_map."""
    classes = lines("label_map_sthv2.txt")
    found = {i: j for i, j in enumerate(flipped_classes(classes, "mirror")) if i != j}
    assert found == {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166, 50: None}
    assert classes[50] == "Plugging something into something but pulling it right out as you remove your hand"


def test_jester() -> None:
    pairs = {
        "Swiping Left": "Swiping Right",
        "Sliding Two Fingers Left": "Sliding Two Fingers Right",
        "Turning Hand Clockwise": "Turning Hand Counterclockwise",
    }
    assert changed(lines("label_map_jester.txt")) == pairs | {b: a for a, b in pairs.items()}


def test_kinetics_names_no_side() -> None:
    assert changed(lines("label_map_k400.txt")) == {}
