"""What is known of a model as one page with pictures, and the pictures alone: by a training and by an evaluation.

It can be made by a process of its own, which reads an `Order` from its input: `python -m vswin_dist.evaluation.page`. That
one loads no torch, and a video at which a decoder fails ends nothing else.
Shapes: N videos, K classes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswin_dist import charts, pages, storage
from vswin_dist.config.schema import DataSettings
from vswin_dist.data.plan import validation_set
from vswin_dist.evaluation.analysis import Analysis, ClassRow, analyse
from vswin_dist.evaluation.metrics import Scores, score
from vswin_dist.evaluation.predictions import Predictions, read
from vswin_dist.manifest import Manifest
from vswin_dist.pictures import pictures, tasks_for

PAGE, PICTURES = "report.html", "pictures"  # in the folder of an order; the second is a folder of SVG files
MOST_NAMED = 40  # classes that are named at an axis; of more the ends, or the most confused
ENDS = 15  # best and worst classes, where there are more than are named
MOST_PAIRS = 25
VIDEOS = 12  # of the surest mistakes, and of the surest hits
FRAMES, WIDTH = 8, 96  # of each: frames, and their width in pixels
ASIDE = "--aside"
LOSSES = {"train/loss": "training", "val/loss": "validation"}
ACCURACIES = {"val/top1": "top-1", "val/top5": "top-5", "val/mean_class_accuracy": "mean class"}


@dataclass(frozen=True)
class Order:
    """What a page is to be made of, as plain values."""

    title: str
    out: str  # URL of the folder that it goes to
    predictions: str | None = None  # URL of what was found of every video; None: nothing was scored
    data: str | None = None  # URL of the shards that were scored
    train: str | None = None  # URL of those that were trained on
    classes: Sequence[str] | None = None  # of these alone; None: all
    curves: Mapping[str, charts.Points] = field(default_factory=dict)  # metric -> (step, value)
    facts: Mapping[str, str] = field(default_factory=dict)  # said in the head
    s3_endpoint: str | None = None


@dataclass(frozen=True)
class Shown:
    """A video of the contact sheet."""

    key: str
    name: str  # its class
    given: str
    probability: float  # of the class that it was given
    frames: list[str]  # `data:` URLs; none where it cannot be read


@dataclass(frozen=True)
class Pair:
    """Videos of a class that were given another."""

    name: str
    given: str
    videos: int
    share: float  # percent of the class


@dataclass(frozen=True)
class Scored:
    """What the page says of scored videos."""

    scores: Scores
    analysis: Analysis
    pairs: list[Pair]
    mistakes: list[Shown]
    hits: list[Shown]


def make(order: Order) -> list[str]:
    """Write the page and its pictures; returns their names in the folder, the page first.

    Raises:
        DataError, StorageError, FileNotFoundError: what it is made of cannot be read. StorageError: `order.out` cannot be
            written.
    """
    storage.use_s3_endpoint(order.s3_endpoint)
    scored, found, balance = None, dict[str, str](), dict[str, list[int]]()
    classes: list[str] = []
    for name, url in (("training", order.train), ("validation" if order.train else "scored", order.data)):
        if url:
            manifest = _read(url, order.classes)
            classes, balance[name] = manifest.classes, _videos_of_classes(manifest)
    found |= _curves(order.curves)
    if order.predictions and order.data:
        predictions = read(order.predictions)
        scored = _scored(predictions, _read(order.data, order.classes), order.data)
        found |= _pictures_of(scored.analysis)
    if balance:
        found["balance"] = _balance(classes, balance)
    page = pages.render(
        "evaluation.html",
        title=order.title,
        facts=order.facts,
        scored=scored,
        charts={name: charts.inline(svg) for name, svg in found.items()},
        balance={name: _spread(n) for name, n in balance.items() if n},
        classes=len(classes),
        most_named=MOST_NAMED,
    )
    files = {PAGE: page, **{f"{PICTURES}/{name}.svg": svg for name, svg in found.items()}}
    for name, text in files.items():
        storage.put_bytes(storage.join(order.out, name), text.encode())
    return list(files)


def _read(url: str, classes: Sequence[str] | None) -> Manifest:
    found = validation_set(DataSettings(train=url, val=url, classes=tuple(classes) if classes else None))
    assert found
    return found


def _videos_of_classes(manifest: Manifest) -> list[int]:
    counts: list[int] = np.bincount(manifest.samples.numbers("class_id"), minlength=len(manifest.classes)).tolist()
    return counts


def _spread(counts: list[int]) -> dict[str, int]:
    return {"least": min(counts), "median": sorted(counts)[len(counts) // 2], "most": max(counts), "none": counts.count(0)}


def _curves(curves: Mapping[str, charts.Points]) -> dict[str, str]:
    found = {}
    for picture, names, y in (("loss", LOSSES, "loss"), ("accuracy", ACCURACIES, "%")):
        if series := {words: curves[name] for name, words in names.items() if curves.get(name)}:
            found[picture] = charts.lines(series, "step", y)
    return found


def _scored(predictions: Predictions, manifest: Manifest, url: str) -> Scored:
    found, names = predictions.found, predictions.identity.classes
    analysis = analyse(found.probabilities, found.labels, names)
    wrong = analysis.confusion - np.diag(np.diag(analysis.confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    totals = analysis.confusion.sum(axis=1)
    pairs = [
        Pair(names[i], names[j], int(wrong[i, j]), 100 * float(wrong[i, j] / totals[i]))
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]
    surest, best = (-found.probabilities.max(axis=1)).argsort(kind="stable"), found.probabilities.argmax(axis=1)
    right = best == found.labels

    def show(rows: NDArray[np.int64]) -> list[Shown]:
        chosen = rows[:VIDEOS].tolist()
        samples = [manifest.samples.row(int(found.indices[r])) for r in chosen]
        tasks = tasks_for(manifest, url, samples, FRAMES, WIDTH)
        sure = found.probabilities.max(axis=1).tolist()
        return [
            Shown(task.sample.key, names[found.labels[r]], names[best[r]], sure[r], pictures(task))
            for r, task in zip(chosen, tasks, strict=True)
        ]

    scores = score(found.probabilities, found.labels, predictions.missing)
    return Scored(scores, analysis, pairs, show(surest[~right[surest]]), show(surest[right[surest]]))


def _pictures_of(analysis: Analysis) -> dict[str, str]:
    if not any(row.videos for row in analysis.classes):
        return {}
    found, names = {}, [row.name for row in analysis.classes]
    shares = 100 * analysis.confusion / np.maximum(analysis.confusion.sum(axis=1, keepdims=True), 1)
    found["confusion"] = charts.heat(shares, names if len(names) <= MOST_NAMED else None)
    if len(names) > MOST_NAMED and len(worst := _most_confused(analysis)):
        found["most_confused"] = charts.heat(shares[np.ix_(worst, worst)], [names[i] for i in worst])
    found["classes"] = charts.bars(*_ends(analysis.classes), "% of the class that is right")
    bins = analysis.bins
    found["reliability"] = charts.reliability(
        [(b.low, b.high) for b in bins], [b.confidence for b in bins], [b.accuracy for b in bins]
    )
    return found


def _most_confused(analysis: Analysis) -> list[int]:
    """Choose the classes of the most confused pairs, as many as can be named."""
    wrong = analysis.confusion - np.diag(np.diag(analysis.confusion))
    chosen: dict[int, None] = {}
    for i, j in zip(*np.unravel_index(np.argsort(-wrong, axis=None, kind="stable"), wrong.shape), strict=True):
        if not wrong[i, j] or len({*chosen, i, j}) > MOST_NAMED:
            break
        chosen |= {int(i): None, int(j): None}
    return list(chosen)


def _ends(rows: Sequence[ClassRow]) -> tuple[list[str], dict[str, list[float]]]:
    """Give the names and the accuracies of all classes with videos, the best first; of many the best and the worst."""
    known = sorted((r for r in rows if r.videos), key=lambda r: (-r.accuracy, r.name))
    if len(known) <= MOST_NAMED:
        return [r.name for r in known], {"accuracy": [r.accuracy for r in known]}
    worst = known[-ENDS:]
    names = [*(r.name for r in known[:ENDS]), f"({len(known) - 2 * ENDS} between them)", *(r.name for r in worst)]
    return names, {"accuracy": [*(r.accuracy for r in known[:ENDS]), 0.0, *(r.accuracy for r in worst)]}


def _balance(classes: Sequence[str], balance: Mapping[str, Sequence[int]]) -> str:
    if len(classes) <= MOST_NAMED:
        return charts.bars(classes, balance, "videos")
    return charts.falling(balance, "classes, from the most videos to the fewest", "videos")


def main() -> int:
    """Make the page that is ordered on the standard input, as JSON, and print the names of its files, one a line.

    With `--aside` it lets others go first on this machine.
    """
    if ASIDE in sys.argv[1:]:
        os.nice(19)
    values: dict[str, Any] = json.load(sys.stdin)
    print("\n".join(make(Order(**values))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
