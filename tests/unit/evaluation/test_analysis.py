"""Classes, confusions, calibration and intervals against plain counts, scikit-learn's numbers and exact distributions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom, bootstrap
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, log_loss, top_k_accuracy_score

from vswin_dist.evaluation import analysis
from vswin_dist.evaluation.metrics import score

K = 7
NAMES = [f"class {c}" for c in range(K + 1)]  # the last one has no video


@pytest.fixture(scope="module")
def videos() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are right more often than not, and the classes of 300 videos."""
    rng = np.random.default_rng(3)
    labels = rng.choice(K, 300, p=np.array([8, 4, 4, 2, 1, 1, 1]) / 21)
    logits = rng.normal(size=(300, K + 1)) + 1.5 * np.eye(K + 1)[labels]
    p = np.exp(2 * logits)
    return p / p.sum(1, keepdims=True), labels


def test_scores_are_scikit_learns(videos: tuple[np.ndarray, np.ndarray]) -> None:
    p, labels = videos
    found = score(p, labels, [])
    assert found.top1 == 100 * top_k_accuracy_score(labels, p, k=1, labels=range(K + 1))
    assert found.top5 == 100 * top_k_accuracy_score(labels, p, k=5, labels=range(K + 1))
    assert found.mean_class_accuracy == pytest.approx(100 * balanced_accuracy_score(labels, p.argmax(1)), rel=1e-14)
    assert found.loss == pytest.approx(log_loss(labels, p, labels=range(K + 1)), rel=1e-12)


def test_classes_and_confusions_agree_with_a_plain_count(videos: tuple[np.ndarray, np.ndarray]) -> None:
    p, labels = videos
    found = analysis.analyse(p, labels, NAMES)
    given = [max(range(K + 1), key=lambda c: row[c]) for row in p]
    pairs = list(zip(labels.tolist(), given, strict=True))
    for c, row in enumerate(found.classes):
        assert found.confusion[c].tolist() == [pairs.count((c, g)) for g in range(K + 1)]
        mine, took = labels.tolist().count(c), given.count(c)
        assert (row.name, row.videos) == (NAMES[c], mine)
        assert row.accuracy == (
            pytest.approx(100 * pairs.count((c, c)) / mine) if mine else pytest.approx(np.nan, nan_ok=True)
        )
        assert row.precision == (
            pytest.approx(100 * pairs.count((c, c)) / took) if took else pytest.approx(np.nan, nan_ok=True)
        )
        others = {g: pairs.count((c, g)) for g in range(K + 1) if g != c}
        assert row.confused == max(others.values())
        assert others.get(NAMES.index(row.confused_with) if row.confused_with else c, 0) == row.confused


def test_calibration_agrees_with_a_plain_count_and_scikit_learn(videos: tuple[np.ndarray, np.ndarray]) -> None:
    p, labels = videos
    found = analysis.analyse(p, labels, NAMES)
    confidence, hit = p.max(1), p.argmax(1) == labels
    ece = 0.0
    for low, high in pairwise(i / 15 for i in range(16)):
        inside = [i for i, c in enumerate(confidence) if low < c <= high]
        if inside:
            ece += len(inside) / 300 * abs(np.mean([hit[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
    assert found.ece == pytest.approx(100 * ece, rel=1e-12) and found.ece > 1
    accuracy, mean = calibration_curve(hit, confidence, n_bins=15)
    assert [b.accuracy for b in found.bins] == pytest.approx(100 * accuracy)
    assert [b.confidence for b in found.bins] == pytest.approx(100 * mean)
    assert sum(b.videos for b in found.bins) == 300
    sure = analysis.reliability(np.array([1.0, 1.0, 0.0]), np.array([True, False, False]))
    assert [(b.videos, b.accuracy) for b in sure] == [(1, 0), (2, 50)], "both ends of the scale have a bin"


def test_intervals_are_those_of_the_exact_distribution_and_of_scipy(videos: tuple[np.ndarray, np.ndarray]) -> None:
    p, labels = videos
    found = analysis.analyse(p, labels, NAMES).intervals
    hits = analysis.best_hits(p, labels)
    for name, column in (("top1", hits[:, 0]), ("top5", hits[:, 1])):  # a resampled count of hits is binomial
        exact = binom.ppf([0.025, 0.975], 300, column.mean()) / 3
        assert [found[name].low, found[name].high] == pytest.approx(exact, abs=0.7)
        assert found[name].score == pytest.approx(100 * column.mean())

    def mean_class(right: np.ndarray, label: np.ndarray) -> float:
        return float(100 * np.mean([right[label == c].mean() for c in np.unique(label)]))

    arguments = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 2000}
    theirs = bootstrap((hits[:, 0], labels), mean_class, **arguments, rng=np.random.default_rng(1))
    mine = found["mean_class_accuracy"]
    assert [mine.low, mine.high] == pytest.approx(theirs.confidence_interval, abs=1.0)
    assert mine.score == pytest.approx(mean_class(hits[:, 0], labels))


def test_the_same_videos_give_the_same_analysis(videos: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = (analysis.analyse(*videos, NAMES) for _ in range(2))
    assert first.intervals == second.intervals and first.bins == second.bins


def test_nothing_scored_has_no_metrics() -> None:
    found = analysis.analyse(np.empty((0, K + 1)), np.empty(0, np.int64), NAMES)
    assert found.metrics() == {} and found.confusion.sum() == 0 and np.isnan(found.ece)
