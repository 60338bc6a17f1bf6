"""A dataset in figures: the table of `data-prep stats`, report.json and report.html, the contact sheet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data_prep import pictures, report_html
from data_prep.executor import Executor, LocalExecutor
from data_prep.report_html import human_bytes, telling_first
from vswin_dist import storage
from vswin_dist.manifest import Manifest, Sample, read_manifest


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Least, median and greatest; zeros where there is none."""
    ordered = sorted(values)
    return (ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else (0.0, 0.0, 0.0)


def stats_table(manifest: Manifest) -> str:
    """The table that `data-prep stats` prints."""
    counts = manifest.counts
    total = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{manifest.name}, {manifest.split}: {counts['kept']:,} videos in {len(manifest.shards):,} shards, "
        f"{human_bytes(total)}, {len(manifest.classes)} classes",
        f"read {counts['read']:,} = kept {counts['kept']:,} + rejected {counts['rejected']:,}",
        "encoding: " + ", ".join(f"{k} {v}" for k, v in manifest.encoding.items()),
        f"fingerprint {manifest.fingerprint}", "",
        f"{'':22}{'least':>10}{'median':>10}{'greatest':>10}",
    ]
    measures: list[tuple[str, list[float], str]] = [
        ("duration, s", [s.duration for s in manifest.samples], ".2f"),
        ("frames", [s.frames for s in manifest.samples], ".0f"),
        ("frames per second", [s.fps for s in manifest.samples], ".2f"),
        ("short side, pixels", [min(s.width, s.height) for s in manifest.samples], ".0f"),
        ("long side, pixels", [max(s.width, s.height) for s in manifest.samples], ".0f"),
        ("bytes of a video", [s.size for s in manifest.samples], ",.0f"),
        ("bytes of a shard", [s.bytes for s in manifest.shards], ",.0f"),
        ("videos of a shard", [s.samples for s in manifest.shards], ",.0f"),
    ]
    for title, values, form in measures:
        lines.append(f"{title:22}" + "".join(f"{value:>{14 if ',' in form else 10}{form}}" for value in spread(values)))
    return "\n".join([*lines, "", *_class_lines(manifest), *_reject_lines(manifest)])


def _class_lines(manifest: Manifest) -> list[str]:
    kept = Counter(s.class_id for s in manifest.samples)
    rejected = Counter(r.class_name for r in manifest.rejected)
    seconds: Counter[int] = Counter()
    for s in manifest.samples:
        seconds[s.class_id] += s.duration  # type: ignore[assignment]
    width = max((len(name) for name in manifest.classes), default=5)
    lines = [f"{'id':>5}  {'class':{width}}{'videos':>9}{'rejected':>10}{'minutes':>9}"]
    for i, name in enumerate(manifest.classes):
        lines.append(f"{i:>5}  {name:{width}}{kept[i]:>9,}{rejected[name]:>10,}{seconds[i] / 60:>9.1f}")
    return lines


def _reject_lines(manifest: Manifest) -> list[str]:
    if not manifest.rejected:
        return []
    lines = ["", "rejected, by reason:"]
    lines += [f"{count:>7,}  {reason}" for reason, count in manifest.counts["reasons"].items()]
    return [*lines, "", *reject_list(manifest)]


def reject_list(manifest: Manifest, most: int = 20) -> list[str]:
    """The rejected videos, one line each, `most` of them at most."""
    lines = [f"rejected {r.source_id}: {r.reason}: {r.detail}" for r in telling_first(manifest.rejected)[:most]]
    if len(manifest.rejected) > most:
        lines.append(f"... and {len(manifest.rejected) - most:,} more, all of them in the manifest")
    return lines


def facts(manifest: Manifest, unnamed: list[str]) -> dict[str, Any]:
    """What report.json holds. No place and no time: the same dataset has the same report."""
    kept = Counter(s.class_id for s in manifest.samples)
    rejected = Counter(r.class_name for r in manifest.rejected)
    measures: dict[str, list[float]] = {
        "duration": [s.duration for s in manifest.samples], "frames": [s.frames for s in manifest.samples],
        "fps": [s.fps for s in manifest.samples], "bytes": [s.size for s in manifest.samples],
        "width": [s.width for s in manifest.samples], "height": [s.height for s in manifest.samples]}
    return {
        "name": manifest.name, "split": manifest.split, "fingerprint": manifest.fingerprint,
        "counts": manifest.counts, "encoding": manifest.encoding,
        "bytes": sum(s.bytes for s in manifest.shards), "hours": sum(measures["duration"]) / 3600,
        "classes": [{"id": i, "name": name, "kept": kept[i], "rejected": rejected[name]}
                    for i, name in enumerate(manifest.classes)],
        "measures": {name: dict(zip(("least", "median", "greatest"), spread(values), strict=True))
                     for name, values in measures.items()},
        "shards": [asdict(s) for s in manifest.shards], "rejected": [asdict(r) for r in manifest.rejected],
        "videos_without_row": unnamed,
    }


def write_reports(manifest: Manifest, out: str, unnamed: list[str], pool: Executor) -> None:
    """Write report.json and report.html beside the manifest; `pool` makes the pictures."""
    figures = facts(manifest, unnamed)
    each = 3 if len(manifest.classes) <= 100 else 2
    images = _images(manifest, out, pictures.first_of_classes(manifest, each), pool, count=1, width=112)
    storage.put_bytes(storage.join(out, "report.json"), (json.dumps(figures, ensure_ascii=False) + "\n").encode())
    storage.put_bytes(storage.join(out, "report.html"), report_html.report_page(manifest, figures, images).encode())


def refresh_reports(manifest: Manifest, out: str, workers: int) -> None:
    """Write the reports of a dataset that changed, with what the last ones say about videos without a row."""
    try:
        unnamed = json.loads(storage.read_bytes(storage.join(out, "report.json")))["videos_without_row"]
    except (FileNotFoundError, ValueError, KeyError):
        unnamed = []
    pool = LocalExecutor(workers)
    try:
        write_reports(manifest, out, unnamed, pool)
    finally:
        pool.close()


def write_preview(url: str, target: str, count: int, workers: int) -> int:
    """Write a contact sheet of `count` samples, spread over the classes; returns how many it shows."""
    manifest = read_manifest(url)
    each = max(1, -(-count // max(1, len(manifest.classes))))
    samples = pictures.first_of_classes(manifest, each)
    samples = samples[:: max(1, len(samples) // max(1, count))][:count]
    pool = LocalExecutor(min(workers, max(1, len(samples))))
    try:
        images = _images(manifest, url, samples, pool, count=8, width=108)
    finally:
        pool.close()
    storage.put_bytes(storage.absolute(target), report_html.sheet_page(manifest, samples, images).encode())
    return len(samples)


def _images(manifest: Manifest, url: str, samples: list[Sample], pool: Executor, count: int,
            width: int) -> dict[str, list[str]]:
    waiting = pictures.tasks_for(manifest, url, samples, count, width)
    images: dict[str, list[str]] = {}
    running = 0
    while waiting or running:
        while waiting and pool.room > 0:
            task = waiting.pop()
            pool.submit(task.sample.key, pictures.pictures, task)
            running += 1
        done = pool.wait()
        running -= 1
        images[done.ticket] = done.value or []
    return images
