"""A dataset in numbers: the table of `data-prep stats`, report.json and report.html, the contact sheet."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import report_html
from data_prep.executor import Executor, LocalExecutor, Task
from data_prep.report_html import human_bytes, kept_of_classes, telling_first
from vswin_dist import pictures, storage
from vswin_dist.errors import before_start
from vswin_dist.manifest import Manifest, Sample, read_manifest


def spread(values: NDArray[Any]) -> tuple[float, float, float]:
    """Give least, median and greatest; zeros where there is none."""
    if not len(values):
        return 0.0, 0.0, 0.0
    ordered = np.sort(values)
    return ordered.item(0), ordered.item(len(ordered) // 2), ordered.item(-1)


def stats_table(manifest: Manifest) -> str:
    """Format the table that `data-prep stats` prints."""
    counts = manifest.counts
    total = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{manifest.name}, {manifest.split}: {counts['kept']:,} videos in {len(manifest.shards):,} shards, "
        f"{human_bytes(total)}, {len(manifest.classes)} classes",
        f"read {counts['read']:,} = kept {counts['kept']:,} + rejected {counts['rejected']:,}",
        "encoding: " + ", ".join(f"{k} {v}" for k, v in manifest.encoding.items()),
        f"fingerprint {manifest.fingerprint}",
        "",
        f"{'':22}{'least':>10}{'median':>10}{'greatest':>10}",
    ]
    numbers = manifest.samples.numbers
    measures: list[tuple[str, NDArray[Any], str]] = [
        ("duration, s", numbers("duration"), ".2f"),
        ("frames", numbers("frames"), ".0f"),
        ("frames per second", numbers("fps"), ".2f"),
        ("short side, pixels", np.minimum(numbers("width"), numbers("height")), ".0f"),
        ("long side, pixels", np.maximum(numbers("width"), numbers("height")), ".0f"),
        ("bytes of a video", numbers("size"), ",.0f"),
        ("bytes of a shard", manifest.shards.numbers("bytes"), ",.0f"),
        ("videos of a shard", manifest.shards.numbers("samples"), ",.0f"),
    ]
    for title, values, form in measures:
        lines.append(f"{title:22}" + "".join(f"{value:>{14 if ',' in form else 10}{form}}" for value in spread(values)))
    return "\n".join([*lines, "", *_class_lines(manifest), *_reject_lines(manifest)])


def _class_lines(manifest: Manifest) -> list[str]:
    kept = kept_of_classes(manifest)
    rejected = manifest.rejected.counts("class_name")
    ids, durations = manifest.samples.numbers("class_id"), manifest.samples.numbers("duration")
    seconds = np.bincount(ids, durations, len(manifest.classes)).tolist()
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
    """List the rejected videos, one line each, `most` of them at most."""
    lines = [f"rejected {r.source_id}: {r.reason}: {r.detail}" for r in telling_first(manifest.rejected, most)]
    if len(manifest.rejected) > most:
        lines.append(f"... and {len(manifest.rejected) - most:,} more, all of them in the manifest")
    return lines


def facts(manifest: Manifest, unlabelled: Sequence[str], notes: Sequence[str]) -> dict[str, Any]:
    """Give what report.json holds. No URL and no time: the same dataset has the same report.

    What may be as long as the dataset is a sequence that makes its values as they are asked for.
    """
    kept = kept_of_classes(manifest)
    rejected = manifest.rejected.counts("class_name")
    columns = {
        "duration": "duration",
        "frames": "frames",
        "fps": "fps",
        "bytes": "size",
        "width": "width",
        "height": "height",
    }
    return {
        "name": manifest.name,
        "split": manifest.split,
        "fingerprint": manifest.fingerprint,
        "counts": manifest.counts,
        "encoding": manifest.encoding,
        "bytes": sum(s.bytes for s in manifest.shards),
        "hours": sum(d for block in manifest.samples.blocks() for d in block["duration"].tolist()) / 3600,
        "classes": [
            {"id": i, "name": name, "kept": kept[i], "rejected": rejected[name]} for i, name in enumerate(manifest.classes)
        ],
        "measures": {
            name: dict(zip(("least", "median", "greatest"), spread(manifest.samples.numbers(column)), strict=True))
            for name, column in columns.items()
        },
        "shards": [asdict(s) for s in manifest.shards],
        "rejected": manifest.rejected,
        "videos_without_row": unlabelled,
        "notes": notes,
    }


def json_parts(values: dict[str, Any]) -> Iterator[str]:
    """Write `values` as `json.dumps` does, a part at a time: their sequences value by value, dataclasses as objects."""
    for number, (name, value) in enumerate(values.items()):
        yield f"{', ' if number else '{'}{json.dumps(name)}: "
        if isinstance(value, Sequence) and not isinstance(value, (str, list)):
            opening = "["
            for item in value:
                item = asdict(item) if is_dataclass(item) and not isinstance(item, type) else item
                yield opening + json.dumps(item, ensure_ascii=False)
                opening = ", "
            yield "[]" if opening == "[" else "]"
        else:
            yield json.dumps(value, ensure_ascii=False)
    yield "}"


def first_of_classes(manifest: Manifest, each: int) -> list[Sample]:
    """Return the first `each` samples of every class, in the order of the classes."""
    ids = manifest.samples.numbers("class_id")
    order = np.argsort(ids, kind="stable")
    _, starts, counts = np.unique(ids[order], return_index=True, return_counts=True)
    rows = [order[start : start + min(count, each)] for start, count in zip(starts, counts, strict=True)]
    return list(manifest.samples[np.concatenate(rows)]) if rows else []


def write_reports(manifest: Manifest, out: str, unlabelled: Sequence[str], notes: Sequence[str], pool: Executor) -> None:
    """Write report.json and report.html beside the manifest; `pool` makes the pictures."""
    measures = facts(manifest, unlabelled, notes)
    each = 3 if len(manifest.classes) <= 100 else 2
    samples = first_of_classes(manifest, each)
    of_sample = _images(manifest, out, samples, pool, count=1, width=112)
    images: dict[int, list[str]] = {}  # by class
    for sample in samples:
        images.setdefault(sample.class_id, []).extend(of_sample.get(sample.key, []))
    with tempfile.TemporaryDirectory() as folder:
        with open(path := Path(folder, "report.json"), "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json_parts(measures))
            file.write("\n")
        storage.put_file(path, storage.join(out, "report.json"))
    storage.put_bytes(storage.join(out, "report.html"), report_html.report_page(manifest, measures, images).encode())


def refresh_reports(manifest: Manifest, out: str, workers: int) -> None:
    """Write the reports of a dataset that changed, with what the last ones say about its source."""
    try:
        last = json.loads(storage.read_bytes(storage.join(out, "report.json")))
    except (FileNotFoundError, ValueError):
        last = {}
    with LocalExecutor(workers) as pool:
        write_reports(manifest, out, last.get("videos_without_row", []), last.get("notes", []), pool)


def write_preview(url: str, target: str, count: int, workers: int) -> int:
    """Write a contact sheet of `count` samples, spread over the classes; returns how many it shows."""
    with before_start():
        manifest = read_manifest(url)
    each = max(1, -(-count // max(1, len(manifest.classes))))
    samples = first_of_classes(manifest, each)
    samples = samples[:: max(1, len(samples) // max(1, count))][:count]
    with LocalExecutor(min(workers, max(1, len(samples)))) as pool:
        images = _images(manifest, url, samples, pool, count=8, width=108)
    storage.put_bytes(storage.absolute(target), report_html.sheet_page(manifest, samples, images).encode())
    return len(samples)


def _images(
    manifest: Manifest, url: str, samples: list[Sample], pool: Executor, count: int, width: int
) -> dict[str, list[str]]:
    tasks = (Task(t.sample.key, pictures.pictures, t) for t in pictures.tasks_for(manifest, url, samples, count, width))
    return {done.ticket: done.value or [] for done in pool.run(tasks)}
