"""What probabilities say beyond their scores: classes, confusions, calibration, and how far chance may have moved a score.

Shapes: N videos, K classes, R resamples, M columns of hits. Everything is a pure function of its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of confidence, equally wide
RESAMPLES, SEED = 2000, 0
LOW, HIGH = 2.5, 97.5  # percentiles of a 95% interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ClassRow:
    """One class: percentages of its videos (recall), and of the videos that were given it (precision); nan of none."""

    id: int
    name: str
    videos: int
    accuracy: float
    precision: float
    f1: float
    confused_with: str  # the class that its other videos are most often given; "" where there is none
    confused: int


@dataclass(frozen=True)
class Bin:
    """The videos whose best class has a probability in (low, high]."""

    low: float
    high: float
    videos: int
    confidence: float  # mean probability of the best class, in percent
    accuracy: float  # percent


@dataclass(frozen=True)
class Interval:
    """A score, and where 95% of the resampled ones lie."""

    score: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.score:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Analysis:
    """What is known of the scored videos."""

    classes: list[ClassRow]
    confusion: Ints  # [K, K]: videos of the row's class that were given the column's
    bins: list[Bin]
    ece: float  # expected calibration error, percent
    intervals: dict[str, Interval]  # top1, top5, mean_class_accuracy

    def metrics(self) -> dict[str, float]:
        """As logged beside the scores; none where nothing was scored."""
        found = {"val/ece": self.ece}
        for name, interval in self.intervals.items():
            found |= {f"val/{name}_low": interval.low, f"val/{name}_high": interval.high}
        return {name: value for name, value in found.items() if not np.isnan(value)}

    def __str__(self) -> str:
        i = self.intervals
        return (
            f"95% of {RESAMPLES} resamples: top-1 {i['top1'].low:.2f} to {i['top1'].high:.2f}, "
            f"top-5 {i['top5'].low:.2f} to {i['top5'].high:.2f}, mean class {i['mean_class_accuracy'].low:.2f} to "
            f"{i['mean_class_accuracy'].high:.2f}; ECE {self.ece:.2f}"
        )


def analyse(probabilities: Floats, labels: Ints, names: list[str]) -> Analysis:
    """Analyse `probabilities` [N, K], already averaged over views, against `labels` [N]."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # seconds, which no training needs

    ids = range(len(names))
    predicted = probabilities.argmax(1)
    hits = best_hits(probabilities, labels)
    if len(labels):
        confusion = confusion_matrix(labels, predicted, labels=ids)
        precision, recall, f1, videos = precision_recall_fscore_support(labels, predicted, labels=ids, zero_division=np.nan)
    else:
        confusion = np.zeros((len(names), len(names)), np.int64)
        precision = recall = f1 = np.full(len(names), np.nan)
        videos = np.zeros(len(names), np.int64)
    wrong = confusion - np.diag(np.diag(confusion))
    rows = []
    for c in ids:
        other, count = int(wrong[c].argmax()), int(wrong[c].max())
        r, p, f = (100 * float(x[c]) for x in (recall, precision, f1))
        rows.append(ClassRow(c, names[c], int(videos[c]), r, p, f, names[other] if count else "", count))
    bins = reliability(probabilities.max(1), hits[:, 0])
    return Analysis(rows, confusion, bins, expected_calibration_error(bins), intervals(hits, labels))


def best_hits(probabilities: Floats, labels: Ints) -> NDArray[np.bool_]:
    """Tell whether the true class is the best one, and whether it is among the best five: [N, 2]."""
    ranked = np.argsort(-probabilities, axis=1, kind="stable")[:, :5] == labels[:, None]
    return np.stack((ranked[:, 0], ranked.any(axis=1)), axis=1)


def reliability(confidence: Floats, hits: NDArray[np.bool_]) -> list[Bin]:
    """Sort videos by the probability of their best class into `BINS` equal bins; bins without videos are left out."""
    edges = np.linspace(0, 1, BINS + 1)
    at = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    found = []
    for b in np.unique(at).tolist():
        inside = at == b
        mean, accuracy = (100 * float(x[inside].mean()) for x in (confidence, hits))
        found.append(Bin(float(edges[b]), float(edges[b + 1]), int(inside.sum()), mean, accuracy))
    return found


def expected_calibration_error(bins: list[Bin]) -> float:
    """Average |accuracy - confidence| of the bins, weighed by their videos (Guo et al. 2017, eq. 5); percent."""
    total = sum(b.videos for b in bins)
    return sum(b.videos * abs(b.accuracy - b.confidence) for b in bins) / total if total else float("nan")


def resample(hits: NDArray[np.bool_], labels: Ints, seed: int = SEED) -> tuple[Floats, Floats]:
    """Draw N of the N videos with replacement, `RESAMPLES` times; the same draws for all columns.

    Args:
        hits: [N, M].

    Returns:
        Percentages [R, M]: of the videos, and the mean over the classes that were drawn.
    """
    rng = np.random.default_rng(seed)
    n, columns = hits.shape
    hit = hits.astype(np.float64)
    plain, by_class = np.empty((RESAMPLES, columns)), np.empty((RESAMPLES, columns))
    for r in range(RESAMPLES):
        drawn = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        plain[r] = drawn @ hit / n
        videos = np.bincount(labels, drawn)
        for m in range(columns):
            by_class[r, m] = (np.bincount(labels, drawn * hit[:, m])[videos > 0] / videos[videos > 0]).mean()
    return 100 * plain, 100 * by_class


def by_class(hits: NDArray[np.bool_], labels: Ints) -> Floats:
    """Average the hits [N, M] of each class that has videos, then these: [M], percent."""
    videos = np.bincount(labels)
    found: Floats = np.stack([np.bincount(labels, h)[videos > 0] / videos[videos > 0] for h in hits.T.astype(float)])
    mean: Floats = 100 * found.mean(axis=1)
    return mean


def interval(score: float, resampled: Floats) -> Interval:
    """Give the percentile interval of `resampled` [R] around `score`."""
    low, high = np.percentile(resampled, (LOW, HIGH))
    return Interval(float(score), float(low), float(high))


def intervals(hits: NDArray[np.bool_], labels: Ints) -> dict[str, Interval]:
    """Find the 95% intervals of the scores by a bootstrap over videos (percentiles); `hits` as `best_hits` gives them."""
    if not len(labels):
        return dict.fromkeys(("top1", "top5", "mean_class_accuracy"), Interval(*[float("nan")] * 3))
    plain, classes = resample(hits, labels)
    top1, top5 = 100 * hits.mean(axis=0)
    return {
        "top1": interval(top1, plain[:, 0]),
        "top5": interval(top5, plain[:, 1]),
        "mean_class_accuracy": interval(by_class(hits, labels)[0], classes[:, 0]),
    }
