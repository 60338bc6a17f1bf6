"""Scores against a plain count."""

import numpy as np
import pytest

from vswin_dist.evaluation.metrics import score


def test_scores_agree_with_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(10), 200)
    labels = rng.integers(0, 10, 200)
    s = score(p, labels, [("lost", "why")])
    order = [sorted(range(10), key=lambda c: -row[c]) for row in p]
    assert s.top1 == pytest.approx(100 * np.mean([o[0] == c for o, c in zip(order, labels, strict=True)]))
    assert s.top5 == pytest.approx(100 * np.mean([c in o[:5] for o, c in zip(order, labels, strict=True)]))
    assert s.loss == pytest.approx(np.mean([-np.log(row[c]) for row, c in zip(p, labels, strict=True)]))
    assert (s.expected, s.scored, len(s.missing)) == (201, 200, 1)
    assert "expected 201 / scored 200 / missing 1" in str(s)


def test_mean_class_accuracy_weighs_classes_equally() -> None:
    s = score(np.array([[1.0, 0], [1, 0], [1, 0], [1, 0]]), np.array([0, 0, 0, 1]), [])
    assert (s.top1, s.mean_class_accuracy, s.top5) == (75.0, 50.0, 100.0)


def test_nothing_scored_is_no_score() -> None:
    s = score(np.empty((0, 3)), np.empty(0, dtype=np.int64), [("a", "gone")])
    assert (s.expected, s.scored) == (1, 0) and np.isnan(s.loss)
