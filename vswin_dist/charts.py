"""Charts for pages and for artifacts of runs, as SVG texts that need nothing else; the same values give the same text.

Shapes: K classes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLUE, RED, ORANGE, GREY = "#4a7dbd", "#c0504d", "#d98d3b", "#8a8a8a"
COLOURS = (BLUE, ORANGE, RED, GREY)
MOST_POINTS = 400  # of a line: more are averaged
MOST_NUMBERS = 12  # classes of a confusion matrix whose cells hold their numbers
LONGEST = 28  # characters of a name at an axis
STYLE: Any = {  # matplotlib takes names that it lists
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",  # texts stay texts, which a reader can search
    "svg.hashsalt": "vswin",
}

Points = Sequence[tuple[float, float]]
Floats = NDArray[np.float64]


class Chart:
    """A figure with its axes; `svg` is set when the block of `drawing` ends."""

    def __init__(self, axes: Any) -> None:
        self.axes, self.svg = axes, ""


@contextmanager
def drawing(width: float, height: float) -> Iterator[Chart]:
    """Make a figure of so many inches, which the block draws."""
    import matplotlib
    from matplotlib.figure import Figure  # seconds, which only a process with a chart needs

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        chart = Chart(figure.subplots())
        yield chart
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        chart.svg = re.sub(r"\s*<metadata>.*?</metadata>", "", written.getvalue(), flags=re.DOTALL)


def inline(svg: str) -> str:
    """Cut from an SVG file what it has no need of within an HTML page."""
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])


def lines(series: Mapping[str, Points], x: str, y: str) -> str:
    """Draw `series` by name; those of few points with a mark at each."""
    with drawing(6.4, 3.2) as chart:
        for (name, points), colour in zip(series.items(), COLOURS, strict=False):
            xs, ys = np.array(thinned(points)).reshape(-1, 2).T
            chart.axes.plot(xs, ys, "o-" if len(xs) <= 40 else "-", label=name, color=colour, markersize=3, linewidth=1.3)
        chart.axes.set(xlabel=x, ylabel=y)
        chart.axes.legend()
    return chart.svg


def thinned(points: Points) -> list[tuple[float, float]]:
    """Average neighbours, so that `MOST_POINTS` are left at most; the last group may be smaller."""
    each = -(-len(points) // MOST_POINTS) or 1
    groups = [np.array(points[i : i + each], float).mean(axis=0).tolist() for i in range(0, len(points), each)]
    return [(a, b) for a, b in groups]


def histogram(values: NDArray[Any], x: str, y: str, bins: int = 40) -> str:
    """Count `values` in equal ranges."""
    with drawing(6.4, 2.2) as chart:
        chart.axes.hist(values, bins=bins, color=BLUE)
        chart.axes.set(xlabel=x, ylabel=y)
    return chart.svg


def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], x: str) -> str:
    """Draw a group of horizontal bars for each of `names`, the first on top."""
    thick = 0.8 / len(series)
    with drawing(6.4, 0.9 + len(names) * (0.12 + 0.13 * len(series))) as chart:
        places = np.arange(len(names))
        for number, ((name, values), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
            chart.axes.barh(places + (number - (len(series) - 1) / 2) * thick, values, thick, label=name, color=colour)
        chart.axes.set_yticks(places, [shortened(n) for n in names])
        chart.axes.set(xlabel=x, ylim=(len(names) - 0.5, -0.5))
        chart.axes.grid(axis="y", visible=False)
        if len(series) > 1:
            chart.axes.legend()
    return chart.svg


def falling(series: Mapping[str, Sequence[float]], x: str, y: str) -> str:
    """Draw the values of each series from the greatest to the least, as steps: how unequal they are."""
    with drawing(6.4, 2.6) as chart:
        for (name, values), colour in zip(series.items(), COLOURS, strict=False):
            ranks = np.arange(1, len(values) + 1)
            chart.axes.step(ranks, sorted(values, reverse=True), where="mid", label=name, color=colour)
        chart.axes.set(xlabel=x, ylabel=y, ylim=(0, None))
        chart.axes.legend()
    return chart.svg


def heat(shares: Floats, names: Sequence[str] | None) -> str:
    """Draw a confusion matrix [K, K] of percentages of each row; with `names` at its axes where they have room."""
    from matplotlib.colors import PowerNorm

    k = len(shares)
    side = 2.2 + 0.26 * k if names else 5.2
    with drawing(side + 0.8, side) as chart:
        axes = chart.axes
        norm = PowerNorm(1 if names else 0.5, 0, 100)  # single cells of hundreds of classes are seen, too
        image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
        axes.grid(visible=False)
        axes.set(xlabel="given", ylabel="class")
        if names:
            short = [shortened(n) for n in names]
            axes.set_xticks(range(k), short, rotation=90)
            axes.set_yticks(range(k), short)
        if k <= MOST_NUMBERS:
            for i, j in np.argwhere(shares >= 0.5):
                axes.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", color="w" if shares[i, j] > 55 else "k")
    return chart.svg


def reliability(ranges: Sequence[tuple[float, float]], confidence: Sequence[float], accuracy: Sequence[float]) -> str:
    """Draw the accuracy of the videos in each range of confidence, against what it would be if confidence were right.

    Args:
        ranges: (low, high], from 0 to 1. confidence, accuracy: of each, percent.
    """
    with drawing(4.2, 4) as chart:
        axes, lows = chart.axes, [100 * low for low, _ in ranges]
        widths = [100 * (high - low) for low, high in ranges]
        axes.bar(lows, accuracy, widths, align="edge", color=BLUE, edgecolor="w", label="accuracy")
        axes.plot(confidence, accuracy, "o", color=RED, markersize=4, label="at the mean confidence")
        axes.plot([0, 100], [0, 100], ":", color=GREY, label="calibrated")
        axes.set(xlabel="confidence, %", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100), aspect="equal")
        axes.legend(loc="upper left", frameon=True)
    return chart.svg


def shortened(name: str) -> str:
    """Cut a name that is too long for an axis; dollars, which would begin a formula, stay dollars."""
    return (name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…").replace("$", r"\$")
