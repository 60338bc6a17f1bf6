"""The page of a model, of real shards and of predictions made up, against plain counts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vswin_dist import charts
from vswin_dist.evaluation import page
from vswin_dist.evaluation.analysis import analyse
from vswin_dist.evaluation.predictions import Found, Identity, Predictions
from vswin_dist.manifest import Manifest, read_manifest
from vswin_dist.pictures import PictureTask, pictures

CURVES = {"train/loss": [(s, 2.0 / s) for s in range(1, 1001)], "val/top1": [(500, 40.0), (1000, 61.5)]}


def predicted(manifest: Manifest, rows: np.ndarray, seed: int = 3) -> Predictions:
    """Random predictions of the samples `rows`, of which the last is missing."""
    rng = np.random.default_rng(seed)
    labels = manifest.samples.numbers("class_id")[rows].astype(np.int64)
    p = rng.dirichlet(np.full(len(manifest.classes), 0.4), len(labels)) + 0.5 * np.eye(len(manifest.classes))[labels]
    n, keys = len(rows) - 1, [manifest.samples.value("key", int(r)) for r in rows]
    found = Found(np.arange(n), labels[:n], (p / p.sum(1, keepdims=True))[:n], [(n, "gone")])
    identity = Identity("w", "c", manifest.fingerprint, "motions val", manifest.classes, 1, 1, 8, False, "cpu", "2")
    return Predictions(identity, found, keys[:n], [(keys[n], "gone")])


def shown(html: str, title: str) -> str:
    """The part of a page below a title."""
    return html.partition(f"<h2>{title}</h2>")[2].partition("<h2>")[0]


@pytest.mark.slow
def test_a_page_of_few_classes_names_what_is_confused_and_shows_the_surest_videos(
    motion_shards: Path, tmp_path: Path
) -> None:
    val = read_manifest(f"{motion_shards}/train")
    found = predicted(val, np.arange(len(val.samples)))
    (tmp_path / "p.parquet").write_bytes(found.to_parquet())
    order = page.Order(
        *("<b>loud", str(tmp_path / "out"), str(tmp_path / "p.parquet")),
        *(f"{motion_shards}/train", f"{motion_shards}/train", None, CURVES, {"recipe": "demo"}),
    )
    names = page.make(order)
    drawn = {f"{page.PICTURES}/{n}.svg" for n in ("loss", "accuracy", "classes", "confusion", "reliability", "balance")}
    assert set(names) == {page.PAGE, *drawn} and all((tmp_path / "out" / n).is_file() for n in names)
    html = (tmp_path / "out" / page.PAGE).read_text()
    assert "http" not in html and "&lt;b&gt;loud" in html and "<b>loud" not in html, "it must need nothing else"

    p, labels = found.found.probabilities, found.found.labels
    given = p.argmax(1)
    assert f"<b>{100 * (given == labels).mean():.2f}%</b>top-1" in html and "<b>1</b>could not be scored" in html
    wrong = Counter((val.classes[a], val.classes[b]) for a, b in zip(labels, given, strict=True) if a != b)
    pairs = re.findall(r"<tr><td>(.*)</td><td>(.*)</td><td class=\"n\">(\d+)</td>", shown(html, "Confusions"))
    assert {(a, b): int(n) for a, b, n in pairs} == wrong and int(pairs[0][2]) == max(wrong.values())
    surest = sorted(range(len(labels)), key=lambda i: -p[i].max())
    for title, right in (("The surest mistakes", False), ("The surest hits", True)):
        rows = [i for i in surest if (given[i] == labels[i]) == right][: page.VIDEOS]
        keys = re.findall(r"%, (.*)</small>", shown(html, title))
        assert keys == [found.keys[i] for i in rows] and shown(html, title).count("<img") == page.FRAMES * len(rows)
    sample = val.samples.row(rows[0])
    task = PictureTask(f"{motion_shards}/train/{val.shards[sample.shard].url}", sample, page.FRAMES, page.WIDTH)
    assert f'<img src="{pictures(task)[0]}"' in shown(html, "The surest hits").partition("</tr>")[0]
    for name in val.classes:
        assert f">{name}</text>" in (tmp_path / "out" / page.PICTURES / "confusion.svg").read_text()


@pytest.mark.slow
def test_of_a_set_of_which_some_classes_alone_are_used_the_videos_are_the_right_ones(
    motion_shards: Path, tmp_path: Path
) -> None:
    """Their places are those in what is left of the set."""
    url, whole = f"{motion_shards}/train", read_manifest(f"{motion_shards}/train")
    rows = np.flatnonzero(np.isin(whole.samples.numbers("class_id"), (2, 5)))
    found = predicted(whole, rows)
    (tmp_path / "p.parquet").write_bytes(found.to_parquet())
    page.make(page.Order("t", str(tmp_path), str(tmp_path / "p.parquet"), url, None, [whole.classes[c] for c in (5, 2)]))
    html = (tmp_path / page.PAGE).read_text()
    named = re.findall(r"<br>is (.*?)<br><small>.*?, (.*)</small>", shown(html, "The surest mistakes"))
    known = {s.key: whole.classes[s.class_id] for s in whole.samples}
    assert named and all(known[key] == name for name, key in named)


@pytest.mark.slow
def test_where_there_are_hundreds_of_classes_the_most_confused_are_named() -> None:
    rng = np.random.default_rng(0)
    names, labels = [f"activity {c}" for c in range(400)], np.repeat(np.arange(400), 10)
    given = np.where(rng.random(4000) < 0.9, labels, rng.integers(0, 400, 4000))
    given[labels == 123] = 321  # the most confused pair
    found = page._pictures_of(analyse(np.eye(400)[given], labels, names))
    assert "activity" not in found["confusion"]
    assert "activity 123" in found["most_confused"] and "activity 321" in found["most_confused"]
    assert found["most_confused"].count(">activity ") <= 2 * page.MOST_NAMED
    named = re.findall(r"activity \d+", found["classes"])
    assert "activity 123" in named and len(named) == 2 * page.ENDS and "(370 between them)" in found["classes"]


def test_a_training_without_a_validation_has_its_loss_and_its_classes(motion_shards: Path, tmp_path: Path) -> None:
    made = page.make(page.Order("t", str(tmp_path), train=f"{motion_shards}/train", curves={"train/loss": [(1, 2.0)]}))
    assert made == ["report.html", "pictures/loss.svg", "pictures/balance.svg"]
    assert "No video was scored." in (tmp_path / "report.html").read_text()


def test_the_process_that_draws_loads_no_torch() -> None:
    code = "import sys, vswin_dist.evaluation.page; print([m for m in ('torch', 'mlflow', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_charts_are_the_same_text_each_time_and_long_lines_are_averaged() -> None:
    points = [(float(s), float(s % 7)) for s in range(10_000)]
    assert charts.lines({"a $x": points}, "step", "y") == charts.lines({"a $x": points}, "step", "y")
    thin = charts.thinned(points)
    assert len(thin) == charts.MOST_POINTS and thin[0] == (12.0, pytest.approx(np.mean([s % 7 for s in range(25)])))
    assert charts.thinned([]) == [] and "2023" not in charts.bars(["$5 & more"], {"n": [1.0]}, "x")
    assert "$5 &amp; more" in charts.bars(["$5 & more"], {"n": [1.0]}, "x")
