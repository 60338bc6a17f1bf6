"""Two models on the same videos, against plain counts and SciPy's paired bootstrap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import bootstrap

from vswin_dist.errors import DataError
from vswin_dist.evaluation.analysis import best_hits, intervals
from vswin_dist.evaluation.compare import Comparison, compare, page
from vswin_dist.evaluation.predictions import Found, Identity, Predictions

NAMES = ["left", "right", "<b>up</b>", "down"]
IDENTITY = Identity("w", "c", "f" * 32, "motions val", NAMES, 4, 3, 8, False, "cpu", "2")
N = 400


def predictions(p: np.ndarray, labels: np.ndarray, identity: Identity = IDENTITY, lost: tuple[int, ...] = ()) -> Predictions:
    """A file of the videos v0, v1, ..., without those that are lost."""
    kept = np.array([i for i in range(len(labels)) if i not in lost])
    found = Found(kept, labels[kept], p[kept], [(i, "gone") for i in lost])
    return Predictions(identity, found, [f"v{i}" for i in kept], [(f"v{i}", "gone") for i in lost])


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities of A and of B, which err on much the same videos, and the classes."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, N)
    common = rng.normal(size=(N, 4)) + 1.2 * np.eye(4)[labels]
    both = [np.exp(common + 0.3 * rng.normal(size=(N, 4)) + gain * np.eye(4)[labels]) for gain in (0.0, 0.3)]
    return both[0] / both[0].sum(1, keepdims=True), both[1] / both[1].sum(1, keepdims=True), labels


@pytest.fixture(scope="module")
def compared(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Comparison:
    a, b, labels = pair
    return compare(("A", "B"), predictions(a, labels), predictions(b, labels))


def test_the_interval_is_that_of_a_paired_bootstrap(
    compared: Comparison, pair: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    a, b, labels = pair
    hits = [best_hits(p, labels)[:, 0].astype(float) for p in (a, b)]
    theirs = bootstrap(
        tuple(hits),
        lambda x, y, axis: 100 * (y.mean(axis) - x.mean(axis)),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = compared.differences[0]
    assert (found.a, found.b) == (pytest.approx(100 * hits[0].mean()), pytest.approx(100 * hits[1].mean()))
    assert found.difference.score == pytest.approx(found.b - found.a)
    assert [found.difference.low, found.difference.high] == pytest.approx(theirs, abs=0.6)
    assert 0.99 < found.better <= 1 and compared.verdict.startswith("B is better in top-1")
    apart = intervals(best_hits(b, labels), labels)["top1"]
    assert found.difference.high - found.difference.low < (apart.high - apart.low), "pairs are not drawn apart"


def test_classes_and_videos_agree_with_a_plain_count(
    compared: Comparison, pair: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    a, b, labels = pair
    right = [[int(row.argmax()) == c for row, c in zip(p, labels, strict=True)] for p in (a, b)]
    pairs = list(zip(*right, strict=True))
    assert (compared.both, compared.none) == (pairs.count((True, True)), pairs.count((False, False)))
    gained = {f"v{i}" for i, x in enumerate(pairs) if x == (False, True)}
    lost = {f"v{i}" for i, x in enumerate(pairs) if x == (True, False)}
    assert {v.key for v in compared.changes if v.gained} == gained
    assert {v.key for v in compared.changes if not v.gained} == lost and gained and lost
    first = compared.changes[0]
    i = int(first.key[1:])
    assert (first.name, first.a, first.b) == (NAMES[labels[i]], NAMES[a[i].argmax()], NAMES[b[i].argmax()])
    assert first.b_probability == b[i].max() == max(b[int(k[1:])].max() for k in gained), "the surest first"
    for c in compared.classes:
        inside = [i for i in range(N) if NAMES[labels[i]] == c.name]
        assert c.videos == len(inside)
        assert (c.a, c.b) == tuple(pytest.approx(100 * np.mean([r[i] for i in inside])) for r in right)
    assert [c.difference for c in compared.gained] == sorted((c.difference for c in compared.gained), reverse=True)


def test_nothing_is_certain_of_a_model_against_itself(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, _, labels = pair
    same = compare(("A", "B"), predictions(a, labels), predictions(a, labels))
    assert [(d.difference.score, d.difference.low, d.difference.high, d.better) for d in same.differences] == [
        (0, 0, 0, 0.5)
    ] * 3
    assert (same.gained, same.lost, same.changes) == ([], [], []) and same.verdict.startswith("neither is better")
    assert "None." in page(same)


def test_other_videos_are_refused_unless_told(pair: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, labels = pair
    other = replace(IDENTITY, fingerprint="e" * 32, dataset="motions test")
    sides = predictions(a, labels, lost=(3,)), predictions(b[:300], labels[:300], other, lost=(5,))
    with pytest.raises(
        DataError, match=r"A was scored on motions val \(fingerprint f{32}\), B on motions test .*--any-data"
    ):
        compare(("A", "B"), *sides)
    found = compare(("A", "B"), *sides, any_data=True)
    assert found.videos == 298 and set(found.left_out) == {"v3", "v5", *(f"v{i}" for i in range(300, N))}
    assert "e" * 32 in page(found) and "102 videos that one of the models" in page(found)
    swapped = labels[:300].copy()
    swapped[7] = (swapped[7] + 1) % 4
    with pytest.raises(DataError, match=r"1 videos have another class in A than in B, first 'v7'"):
        compare(("A", "B"), sides[0], predictions(b[:300], swapped, other), any_data=True)
    classes = replace(other, classes=["left", "right", "down", "<b>up</b>"])
    with pytest.raises(DataError, match=r"tell other classes apart: 4 against 4, first '<b>up</b>' against 'down'"):
        compare(("A", "B"), sides[0], predictions(b, labels, classes), any_data=True)


def test_the_page_has_the_numbers_and_escapes_names(compared: Comparison) -> None:
    text = page(compared)
    assert "&lt;b&gt;up&lt;/b&gt;" in text and "<b>up</b>" not in text
    d = compared.differences[0].difference
    assert f"{d.low:+.2f} to {d.high:+.2f}" in text and f"{d.low:+.2f} to {d.high:+.2f}" in str(compared)
    assert all(v.key in text for v in compared.changes)
