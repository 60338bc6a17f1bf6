"""Two models on the same videos: how their scores differ, how sure that is, and which classes and videos it comes from.

Everything is said of B against A: what is gained is right with B and was wrong with A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vswin_dist import pages
from vswin_dist.errors import DataError
from vswin_dist.evaluation.analysis import Interval, best_hits, by_class, interval, resample
from vswin_dist.evaluation.predictions import Identity, Predictions
from vswin_dist.manifest import nfc

SCORES = ("top-1", "top-5", "mean class")
MOST_VIDEOS = 1000  # listed on the page
BAR_PIXELS = 160  # of a class that is gained or lost as a whole


@dataclass(frozen=True)
class Difference:
    """A score of both, in percent, and B's less A's with the 95% interval of a paired bootstrap over videos."""

    score: str
    a: float
    b: float
    difference: Interval
    better: float  # share of the resamples in which B is above A, those in which they are equal by half


@dataclass(frozen=True)
class ClassChange:
    """A class, and the percentages of its videos that are right."""

    name: str
    videos: int
    a: float
    b: float

    @property
    def difference(self) -> float:
        """B's less A's."""
        return self.b - self.a


@dataclass(frozen=True)
class VideoChange:
    """A video that is right with one of them alone: what each says it is, and how sure it is of that."""

    key: str
    name: str  # its class
    a: str
    a_probability: float
    b: str
    b_probability: float

    @property
    def gained(self) -> bool:
        """True where B is right."""
        return self.b == self.name


@dataclass(frozen=True)
class Comparison:
    """What sets two models apart on the videos that both have scored."""

    a: str
    b: str
    identities: tuple[Identity, Identity]
    videos: int
    left_out: list[str]  # keys of those that one of them alone has scored
    differences: list[Difference]
    classes: list[ClassChange]  # with videos; most gained first
    changes: list[VideoChange]  # gained first; surest first
    both: int  # videos that are right with both
    none: int

    @property
    def gained(self) -> list[ClassChange]:
        """The classes in which more videos are right with B."""
        return [c for c in self.classes if c.difference > 0]

    @property
    def lost(self) -> list[ClassChange]:
        """Those in which fewer are, most lost first."""
        return [c for c in reversed(self.classes) if c.difference < 0]

    @property
    def verdict(self) -> str:
        """What the interval of top-1 says."""
        d = self.differences[0].difference
        if d.low > 0 or d.high < 0:
            return f"{'B' if d.low > 0 else 'A'} is better in top-1: the 95% interval of the difference leaves out 0"
        return "neither is better in top-1 for certain: the 95% interval of the difference holds 0"

    def metrics(self) -> dict[str, float]:
        """As logged."""
        found: dict[str, float] = {}
        for d in self.differences:
            name = f"compare/{d.score.replace('-', '').replace(' ', '_')}"
            found |= {f"{name}_difference": d.difference.score, f"{name}_low": d.difference.low}
            found |= {f"{name}_high": d.difference.high, f"{name}_better": d.better}
        return found

    def __str__(self) -> str:
        lines = [f"A  {self.a}, {self.identities[0].views}", f"B  {self.b}, {self.identities[1].views}"]
        where = f"{self.identities[0].dataset}: {self.videos:,} videos"
        lines += [where + (f", {len(self.left_out):,} left out that one of them alone has scored" * bool(self.left_out))]
        lines += [f"{'':12}{'A':>8}{'B':>8}{'B - A':>8}  95% interval        B better in"]
        for d in self.differences:
            i = d.difference
            between = f"{i.low:+.2f} to {i.high:+.2f}"
            lines += [f"{d.score:12}{d.a:8.2f}{d.b:8.2f}{i.score:+8.2f}  {between:19} {d.better:.1%} of resamples"]
        lines += [f"{self.verdict}"]
        for word, classes in (("gained", self.gained), ("lost", self.lost)):
            lines += [f"classes that {word}: {len(classes)}"]
            lines += [f"  {c.difference:+7.2f}  {c.name} ({c.a:.2f} to {c.b:.2f} of {c.videos})" for c in classes[:10]]
        gained = sum(v.gained for v in self.changes)
        alone = f"B alone {gained}, A alone {len(self.changes) - gained}"
        lines += [f"videos that are right with {alone}, both {self.both}, none {self.none}"]
        return "\n".join(lines)


def check_comparable(a: Identity, b: Identity, any_data: bool) -> None:
    """Refuse two evaluations of different videos unless `any_data`, and of different classes in any case.

    Raises:
        DataError: says what differs.
    """
    if list(map(nfc, a.classes)) != list(map(nfc, b.classes)):
        other = [(x, y) for x, y in zip(a.classes, b.classes, strict=False) if nfc(x) != nfc(y)]
        first = f", first {other[0][0]!r} against {other[0][1]!r}" if other else ""
        raise DataError(f"A and B tell other classes apart: {len(a.classes)} against {len(b.classes)}{first}")
    if a.fingerprint != b.fingerprint and not any_data:
        raise DataError(
            f"A was scored on {a.dataset} (fingerprint {a.fingerprint}), B on {b.dataset} ({b.fingerprint}): other videos. "
            "Score both on one set, or give --any-data to compare them on the keys that both have"
        )


def compare(names: tuple[str, str], a: Predictions, b: Predictions, any_data: bool = False) -> Comparison:
    """Compare two models, called `names`, on the videos that both have scored.

    Raises:
        DataError: they were not scored on the same videos, see `check_comparable`, or have none in common.
    """
    check_comparable(a.identity, b.identity, any_data)
    places = {key: row for row, key in enumerate(b.keys)}
    rows = [(i, places[key]) for i, key in enumerate(a.keys) if key in places]
    if not rows:
        raise DataError("A and B have scored no video in common")
    first, second = np.array(rows).T
    labels = a.found.labels[first]
    if len(other := np.flatnonzero(labels != b.found.labels[second])):
        raise DataError(f"{len(other)} videos have another class in A than in B, first {a.keys[first[other[0]]]!r}")
    pa, pb = a.found.probabilities[first], b.found.probabilities[second]
    hits = np.concatenate((best_hits(pa, labels), best_hits(pb, labels)), axis=1)  # top-1 and top-5 of A, then of B
    right_a, right_b = hits[:, 0], hits[:, 2]
    common = {a.keys[i] for i in first}
    everything = [*a.keys, *b.keys, *(key for p in (a, b) for key, _ in p.missing)]
    return Comparison(
        *names,
        identities=(a.identity, b.identity),
        videos=len(labels),
        left_out=[key for key in dict.fromkeys(everything) if key not in common],
        differences=_differences(hits, labels),
        classes=_classes(right_a, right_b, labels, a.identity.classes),
        changes=_changes([a.keys[i] for i in first], labels, pa, pb, a.identity.classes),
        both=int((right_a & right_b).sum()),
        none=int((~right_a & ~right_b).sum()),
    )


def _differences(hits: NDArray[np.bool_], labels: NDArray[np.int64]) -> list[Difference]:
    plain, classes = resample(hits, labels)
    means, class_means = 100 * hits.mean(axis=0), by_class(hits, labels)
    columns = ((means[0], means[2], plain[:, [0, 2]]), (means[1], means[3], plain[:, [1, 3]]))
    found = []
    for name, (a, b, drawn) in zip(SCORES, (*columns, (class_means[0], class_means[2], classes[:, [0, 2]])), strict=True):
        differences = drawn[:, 1] - drawn[:, 0]
        better = float((differences > 0).mean() + (differences == 0).mean() / 2)
        found.append(Difference(name, float(a), float(b), interval(b - a, differences), better))
    return found


def _classes(
    right_a: NDArray[np.bool_], right_b: NDArray[np.bool_], labels: NDArray[np.int64], names: Sequence[str]
) -> list[ClassChange]:
    found = []
    for c in np.unique(labels).tolist():
        inside = labels == c
        a, b = (100 * float(right[inside].mean()) for right in (right_a, right_b))
        found.append(ClassChange(names[c], int(inside.sum()), a, b))
    return sorted(found, key=lambda c: (-c.difference, c.name))


def _changes(
    keys: list[str],
    labels: NDArray[np.int64],
    pa: NDArray[np.float64],
    pb: NDArray[np.float64],
    names: Sequence[str],
) -> list[VideoChange]:
    best_a, best_b = pa.argmax(1), pb.argmax(1)
    found = [
        VideoChange(keys[i], names[labels[i]], names[best_a[i]], float(pa[i].max()), names[best_b[i]], float(pb[i].max()))
        for i in np.flatnonzero((best_a == labels) != (best_b == labels)).tolist()
    ]
    return sorted(found, key=lambda v: (not v.gained, -(v.b_probability if v.gained else v.a_probability), v.key))


def page(comparison: Comparison) -> str:
    """Render the comparison as one HTML file."""
    return pages.render(
        "compare.html", title=f"{comparison.b} against {comparison.a}", c=comparison, most=MOST_VIDEOS, bar=BAR_PIXELS
    )
