"""The report and the contact sheet as single HTML files that need nothing else."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from vswin_dist.manifest import Manifest, Reject, Sample

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4a7dbd; --bad: #c0504d; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } tr { border-bottom: 1px solid var(--line); }
.figures { display: flex; flex-wrap: wrap; gap: 2.2rem; } .figures b { display: block; font-size: 1.5rem; }
.bar { display: inline-block; height: .8rem; background: var(--bar); vertical-align: middle; }
.bar.bad { background: var(--bad); } .plot { display: flex; align-items: flex-end; gap: 2px; height: 7rem; }
.plot i { flex: 1; background: var(--bar); min-height: 1px; } .ends { display: flex; justify-content: space-between; }
img { display: inline-block; margin: 0 3px 0 0; border-radius: 3px; vertical-align: middle; max-height: 6rem; }
.wrap { overflow-x: auto; } small { opacity: .75; } .name { width: 12rem; overflow-wrap: anywhere; }
.film { white-space: nowrap; }
"""


def human_bytes(count: float) -> str:
    """``1.5 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def page(title: str, body: str) -> str:
    """A whole HTML file."""
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
            f"<body>\n{body}\n</body></html>\n")


def histogram(title: str, values: list[float], unit: str, bins: int = 40) -> str:
    """A bar for each of `bins` equal ranges; the ends are labelled."""
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / bins or 1.0
    counts = Counter(min(bins - 1, int((v - low) / step)) for v in values)
    most = max(counts.values())
    bars = "".join(f'<i style="height:{100 * counts[i] / most:.1f}%" title="{low + i * step:.4g} to '
                   f'{low + (i + 1) * step:.4g} {unit}: {counts[i]}"></i>' for i in range(bins))
    least, greatest = (f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in (low, high))
    return (f'<h2>{escape(title)}</h2><div class="plot">{bars}</div><div class="ends"><small>{least} {unit}</small>'
            f"<small>highest bar: {most:,} videos</small><small>{greatest} {unit}</small></div>")


def report_page(manifest: Manifest, facts: dict[str, Any], pictures: dict[str, list[str]]) -> str:
    """The report: figures, class balance with pictures, distributions, rejects, what has no row."""
    counts = manifest.counts
    figures = [("videos kept", f"{counts['kept']:,}"), ("rejected", f"{counts['rejected']:,}"),
               ("files without a row", f"{len(facts['videos_without_row']):,}"), ("classes", f"{len(manifest.classes):,}"),
               ("shards", f"{len(manifest.shards):,}"), ("of shards", human_bytes(facts["bytes"])),
               ("hours", f"{facts['hours']:.2f}")]
    body = [f"<h1>{escape(manifest.name)}, {escape(manifest.split)}</h1>",
            '<div class="figures">' + "".join(f"<div><b>{v}</b>{k}</div>" for k, v in figures) + "</div>",
            f"<p><small>fingerprint {manifest.fingerprint}; "
            + escape(", ".join(f"{k} {v}" for k, v in manifest.encoding.items())) + "</small></p>",
            _class_table(manifest, pictures),
            histogram("Durations", [s.duration for s in manifest.samples], "s"),
            histogram("Bytes of a video", [float(s.size) for s in manifest.samples], "bytes"),
            histogram("Short sides", [float(min(s.width, s.height)) for s in manifest.samples], "pixels"),
            histogram("Frames per second", [s.fps for s in manifest.samples], "fps"),
            _rejects(manifest), _unnamed(facts["videos_without_row"])]
    return page(f"{manifest.name}, {manifest.split}", "\n".join(body))


def _class_table(manifest: Manifest, pictures: dict[str, list[str]]) -> str:
    kept = Counter(s.class_id for s in manifest.samples)
    rejected = Counter(r.class_name for r in manifest.rejected)
    shown: dict[int, list[str]] = {}
    for sample in manifest.samples:
        shown.setdefault(sample.class_id, []).extend(pictures.get(sample.key, []))
    most = max((kept[i] + rejected[name] for i, name in enumerate(manifest.classes)), default=1) or 1
    rows = []
    for i, name in enumerate(manifest.classes):
        bars = "".join(f'<span class="bar{kind}" style="width:{160 * n / most:.1f}px"></span>'
                       for n, kind in ((kept[i], ""), (rejected[name], " bad")) if n)
        images = "".join(f'<img src="{p}" alt="" loading="lazy">' for p in shown.get(i, []))
        rows.append(f'<tr><td class="n">{i}</td><td>{escape(name)}</td><td class="n">{kept[i]:,}</td>'
                    f'<td class="n">{rejected[name]:,}</td><td>{bars}</td><td>{images}</td></tr>')
    per_class = sorted(kept[i] for i in range(len(manifest.classes)))
    none = f"; {per_class.count(0):,} classes have none" if not per_class[0] else ""
    balance = (f"<p>Videos kept of a class: {per_class[0]:,} to {per_class[-1]:,}, median "
               f"{per_class[len(per_class) // 2]:,}{none}.</p>")
    return (f'<h2>Classes</h2>{balance}<div class="wrap"><table><tr><th class="n">id</th><th>class</th>'
            f'<th class="n">kept</th><th class="n">rejected</th><th></th><th></th></tr>{"".join(rows)}</table></div>')


def telling_first(rejected: list[Reject]) -> list[Reject]:
    """Rows without a video last: every Kinetics has thousands, and they say little."""
    return sorted(rejected, key=lambda r: r.reason == "missing_video")


def _rejects(manifest: Manifest, most: int = 1000) -> str:
    if not manifest.rejected:
        return "<h2>Rejected</h2><p>None.</p>"
    reasons = ", ".join(f"{n:,} {escape(reason)}" for reason, n in manifest.counts["reasons"].items())
    rows = "".join(f"<tr><td>{escape(r.source_id)}</td><td>{escape(r.class_name)}</td><td>{escape(r.reason)}</td>"
                   f"<td>{escape(r.detail)}</td></tr>" for r in telling_first(manifest.rejected)[:most])
    more = f"<p>The first {most:,}; all are in report.json.</p>" if len(manifest.rejected) > most else ""
    return (f'<h2>Rejected</h2><p>{reasons}</p>{more}<div class="wrap"><table><tr><th>video</th><th>class</th>'
            f"<th>reason</th><th>detail</th></tr>{rows}</table></div>")


def _unnamed(names: list[str], most: int = 200) -> str:
    if not names:
        return ""
    listed = "".join(f"<li>{escape(n)}</li>" for n in names[:most])
    more = f"<p>The first {most}; all {len(names):,} are in report.json.</p>" if len(names) > most else ""
    return f"<h2>Files without a row</h2>{more}<ul>{listed}</ul>"


def sheet_page(manifest: Manifest, samples: list[Sample], pictures: dict[str, list[str]]) -> str:
    """The contact sheet: a row of frames over time for each sample."""
    rows = []
    for s in samples:
        images = "".join(f'<img src="{p}" alt="">' for p in pictures.get(s.key, []))
        rows.append(f'<tr><td class="name">{escape(manifest.classes[s.class_id])}<br><small>{escape(s.source_id)}<br>'
                    f"{s.width}x{s.height}, {s.frames} frames<br>{s.fps:g} fps, {s.duration:.3g} s</small></td>"
                    f'<td class="film">{images or "cannot be decoded"}</td></tr>')
    title = f"{manifest.name}, {manifest.split}: {len(samples)} of {len(manifest.samples):,} videos"
    return page(title, f'<h1>{escape(title)}</h1><div class="wrap"><table>{"".join(rows)}</table></div>')
