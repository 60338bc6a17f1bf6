"""What data_prep keeps of ten million rows: the answers that lists and dictionaries give, in a fraction of their memory."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_prep import journal
from data_prep.compact import BLOCK, Chosen, Lookup, TextList
from data_prep.order import in_order, order_key
from data_prep.report import json_parts
from data_prep.sources.base import Listing, find_files, read_lines
from data_prep.sources.folder import FolderSource
from data_prep.sources.items import Item, Items
from data_prep.stretch import Stretch
from tests.unit.data_prep.inprocess import InProcess, prepare
from tests.unit.data_prep.videos import make_folders
from vswin_dist.benchmarks import rows
from vswin_dist.columns import Table
from vswin_dist.errors import DataError, WorkFailed
from vswin_dist.manifest import Reject

TEXTS = ["", "a", "café", "e\u0301", "日本/x.mp4", "a", "z" * 300]


def test_a_list_of_texts_is_one() -> None:
    found = TextList(TEXTS)
    assert list(found) == TEXTS and len(found) == len(TEXTS)
    assert [found[i] for i in range(-len(TEXTS), len(TEXTS))] == TEXTS * 2
    assert (found[2:5], found[::-2], found[5:2]) == (TEXTS[2:5], TEXTS[::-2], [])
    for index in (len(TEXTS), -len(TEXTS) - 1):
        with pytest.raises(IndexError):
            found[index]
    chosen = Chosen(found, [4, 0, 2])
    assert list(chosen) == ["日本/x.mp4", "", "café"] and chosen[-1] == "café" and chosen[:2] == ["日本/x.mp4", ""]
    assert list(TextList()) == [] and not TextList()
    many = [str(n) for n in range(2 * BLOCK + 3)]
    assert list(TextList(many)) == many


class Alike(str):
    """A text whose hash all of them share: what a lookup finds then, it finds by the texts alone."""

    def __hash__(self) -> int:
        return 7

    __eq__ = str.__eq__


@pytest.mark.parametrize("kind", [str, Alike])
def test_a_lookup_answers_as_a_dictionary(kind: Any) -> None:
    rng, known = random.Random(0), {}
    texts: list[str] = []
    lookup = Lookup(texts.__getitem__)
    for _ in range(600):
        text = kind(rng.randrange(250))
        assert lookup.find(text) == known.get(text, -1)
        if rng.random() < 0.7:
            first = known.setdefault(text, len(texts))
            assert lookup.add(text, len(texts)) == first
        else:
            assert lookup.put(text, len(texts)) == known.get(text, -1)
            known[text] = len(texts)
        texts.append(text)
    assert all(lookup.find(text) == number for text, number in known.items()) and len(known) > 200


ITEMS = [
    Item("a/b.mp4", "x", "s3://b/a/b.mp4"),
    Item("gone.mp4", "y", ""),
    Item("s3://b/c", "x", "s3://b/c", Stretch(1.0, 2.5)),
    Item("d#t=3", "z", "s3://b/d", Stretch(3.0)),
    Item("e_000001_000002", "y", "", Stretch(1.0, 2.0, True)),
]


def test_items_come_back_as_they_were() -> None:
    for kept in (ITEMS, ITEMS[:2]):
        items = Items.of(kept)
        assert list(items) == kept and items[-1] == kept[-1] and items[:2] == kept[:2] and len(items) == len(kept)
        rows = np.array(range(len(kept)))[::-1]
        assert list(items.reordered(rows)) == kept[::-1] and list(items.reordered(rows).reordered(rows)) == kept
        with pytest.raises(IndexError):
            items.reordered(rows)[len(kept)]
    items = Items.of(ITEMS)
    assert Listing(ITEMS).items[3] == ITEMS[3]  # type: ignore[arg-type] # what a source of one's own may give
    assert items.class_names == ["x", "y", "z"] and items.present_classes() == {"x", "z"} and items.count_cut() == 2
    assert items.reordered(np.array([1, 2, 0])).present().tolist() == [1, 2]
    assert items.first_of_class("y") == ITEMS[1] and Items.of(ITEMS[:2]).count_cut() == 0
    assert list(in_order(items, 5)) == sorted(ITEMS, key=lambda item: order_key(5, item.source_id))


def test_files_are_listed_in_the_order_of_their_whole_paths(tmp_path: Path) -> None:
    names = ["a/z", "a-b/z", "a.mp4", "aé/1", "a/b/c", "ab", "A", ".h/x", "b/.h", "c/d.e/f", "c/d-/g"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
        fsspec.filesystem("memory").pipe_file(f"/listed/{name}", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    (tmp_path / "circle").symlink_to("circle")
    found = [str(p.relative_to(tmp_path)) for p in map(Path, _walked(tmp_path))]
    wanted = sorted(name for name in found if "/." not in f"/{name}")
    assert "link/d.e/f" in wanted and {"broken", "circle"} < set(wanted)
    assert list(find_files(str(tmp_path))) == wanted
    assert list(find_files("memory://listed")) == sorted(name for name in names if "/." not in f"/{name}")


def test_objects_that_stand_for_folders_are_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the consoles of S3 make them; the names are those that s3fs gives."""
    objects = ["b/videos/", "b/videos/c1/", "b/videos/c1/a.mp4", "b/videos/empty/"]

    class Console:
        exists = staticmethod(lambda path: True)

        @staticmethod
        def ls(path: str, detail: bool) -> list[dict[str, str]]:
            folders = [{"name": f"b/videos/{name}", "type": "directory"} for name in ("c1", "empty")]
            return [{"name": "b/videos/", "type": "file"}, *folders]

        @staticmethod
        def find(path: str) -> list[str]:
            return [name for name in objects if name.startswith(f"{path}/")]

    monkeypatch.setattr("vswin_dist.storage.filesystem", lambda url: (Console, "b/videos"))
    assert list(find_files("s3://b/videos")) == ["c1/a.mp4"]


def _walked(folder: Path) -> list[str]:
    return [f"{root}/{name}" for root, _, names in os.walk(folder, followlinks=True) for name in names]


def test_a_text_that_is_none_says_the_line(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfone\r\ntw\xc3\xb6\n\xff\n")
    lines = read_lines(str(tmp_path / "t"), "list")
    assert [next(lines), next(lines)] == ["one\r\n", "twö\n"]
    with pytest.raises(DataError, match=r"list .* is not a text file: line 3: .*0xff"):
        next(lines)


def test_a_report_in_parts_is_what_json_says() -> None:
    rejects = [Reject(f"{n}é", 'a "b"', "truncated", "") for n in range(3)]
    for some in (rejects, []):
        values = {"name": "x", "none": None, "rejected": Table.of(Reject, some), "notes": TextList(["a", "ä"]), "l": [1, 2]}
        plain = {**values, "rejected": [{n: getattr(r, n) for n in Reject.__slots__} for r in some], "notes": ["a", "ä"]}
        assert "".join(json_parts(values)) == json.dumps(plain, ensure_ascii=False)


@pytest.mark.slow
def test_a_duplicate_of_what_an_earlier_run_packed_names_it(tmp_path: Path) -> None:
    root = make_folders(tmp_path / "in", classes=1, each=4, frames=4)
    for number in range(4):
        (root / "class 0" / f"twin{number}.mp4").write_bytes((root / "class 0" / f"v{number}.mp4").read_bytes())
    whole = prepare(FolderSource(str(root)), tmp_path / "a")
    assert whole.counts["reasons"] == {"duplicate": 4}
    with pytest.raises(WorkFailed):
        prepare(FolderSource(str(root)), tmp_path / "b", executor=InProcess(stop_after=9))
    assert [p.name for p in (tmp_path / "b" / ".data-prep" / "records").iterdir()] == ["00000000.json"]
    first = {sample.source_id for sample in whole.samples if sample.shard == 0}
    later = whole.rejected[len(journal.read_record(str(tmp_path / "b"), 0).rejected) :]
    assert any(reject.detail.removeprefix("the same bytes as ") in first for reject in later)
    assert prepare(FolderSource(str(root)), tmp_path / "b") == whole


@pytest.mark.slow
def test_the_driver_keeps_little_of_a_row(tmp_path: Path) -> None:
    few, many = 1_000, 16_000
    peaks = []
    for count in (few, many):
        (tmp_path / str(count)).mkdir()
        phases = rows.measure(count, str(tmp_path / str(count)))
        assert [p.name for p in phases] == ["listing and ordering", "results and records", "manifest and reports"]
        peaks.append(phases[1].peak_mb)
    assert (peaks[1] - peaks[0]) * 1e6 < 600 * (many - few), "about 150 bytes a row, of which 50 are its name"
