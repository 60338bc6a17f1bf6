"""The report and the contact sheet as single HTML files that need nothing else, from the pages in `templates/`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswin_dist import charts, pages
from vswin_dist.columns import BLOCK, Table
from vswin_dist.manifest import Manifest, Reject, Sample

MOST_REJECTS = 1000  # listed on the page
MOST_UNLABELLED = 200
BAR_PIXELS = 160  # of the class with the most videos


def human_bytes(count: float) -> str:
    """Format a number of bytes as `1.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _render(template: str, **values: Any) -> str:
    return pages.render(template, "data_prep", **values)


def histogram(title: str, values: NDArray[Any], unit: str) -> list[tuple[str, str]]:
    """Draw how `values` are spread: the title and the chart; nothing where there is no value."""
    return [(title, charts.inline(charts.histogram(values, unit, "videos")))] if len(values) else []


def kept_of_classes(manifest: Manifest) -> list[int]:
    """Count the kept videos of each class."""
    found: list[int] = np.bincount(manifest.samples.numbers("class_id"), minlength=len(manifest.classes)).tolist()
    return found


def report_page(manifest: Manifest, facts: dict[str, Any], pictures: dict[int, list[str]]) -> str:
    """Render the report: totals, class balance with pictures (by class id), distributions, rejects, what has no row."""
    counts = manifest.counts
    numbers = manifest.samples.numbers
    classes = _class_rows(manifest, pictures)
    kept = sorted(row["kept"] for row in classes)
    return _render(
        "report.html",
        title=f"{manifest.name}, {manifest.split}",
        manifest=manifest,
        totals=[
            ("videos kept", f"{counts['kept']:,}"),
            ("rejected", f"{counts['rejected']:,}"),
            ("files without a row", f"{len(facts['videos_without_row']):,}"),
            ("classes", f"{len(manifest.classes):,}"),
            ("shards", f"{len(manifest.shards):,}"),
            ("of shards", human_bytes(facts["bytes"])),
            ("hours", f"{facts['hours']:.2f}"),
        ],
        classes=classes,
        balance={"least": kept[0], "most": kept[-1], "median": kept[len(kept) // 2], "none": kept.count(0)},
        plots=[
            *histogram("Durations", numbers("duration"), "s"),
            *histogram("Bytes of a video", numbers("size"), "bytes"),
            *histogram("Short sides", np.minimum(numbers("width"), numbers("height")), "pixels"),
            *histogram("Frames per second", numbers("fps"), "fps"),
        ],
        rejects=telling_first(manifest.rejected, MOST_REJECTS),
        notes=facts["notes"][:MOST_UNLABELLED],
        unlabelled=facts["videos_without_row"],
        most_unlabelled=MOST_UNLABELLED,
    )


def _class_rows(manifest: Manifest, pictures: dict[int, list[str]]) -> list[dict[str, Any]]:
    kept = kept_of_classes(manifest)
    rejected = manifest.rejected.counts("class_name")
    most = max((kept[i] + rejected[name] for i, name in enumerate(manifest.classes)), default=1) or 1
    return [
        {
            "id": i,
            "name": name,
            "kept": kept[i],
            "kept_width": BAR_PIXELS * kept[i] / most,
            "rejected": rejected[name],
            "rejected_width": BAR_PIXELS * rejected[name] / most,
            "pictures": pictures.get(i, []),
        }
        for i, name in enumerate(manifest.classes)
    ]


def telling_first(rejected: Table[Reject], most: int) -> list[Reject]:
    """Give the first `most`, rows without a video last: every Kinetics has thousands, and they say little."""
    missing = np.empty(len(rejected), dtype=bool)
    for number, block in enumerate(rejected.blocks()):
        reasons = block["reason"].tolist()
        missing[number * BLOCK :][: len(reasons)] = [reason == "missing_video" for reason in reasons]
    return list(rejected[np.argsort(missing, kind="stable")[:most]])


def sheet_page(manifest: Manifest, samples: list[Sample], pictures: dict[str, list[str]]) -> str:
    """Render the contact sheet: a row of frames over time for each sample."""
    return _render(
        "sheet.html",
        title=f"{manifest.name}, {manifest.split}: {len(samples)} of {len(manifest.samples):,} videos",
        classes=manifest.classes,
        samples=samples,
        pictures=pictures,
    )
