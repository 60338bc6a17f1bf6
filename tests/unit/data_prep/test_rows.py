"""Rows that name videos by path: the spellings that are taken, repeated rows, class ids, composed and decomposed letters."""

from __future__ import annotations

import json
import os
import tarfile
import unicodedata
from pathlib import Path

import pytest

from data_prep.pipeline import list_source
from data_prep.repair import repair
from data_prep.sources.csv_index import CsvSource
from data_prep.sources.folder import FolderSource
from data_prep.sources.kinetics import KineticsSource
from data_prep.sources.path_list import ListSource
from data_prep.verify import verify_dataset
from tests.unit.data_prep.inprocess import COPY, prepare, tars
from tests.unit.data_prep.test_sources import tar_of
from tests.unit.data_prep.videos import make_video
from vswin_dist.config.schema import DataSettings
from vswin_dist.data.plan import make_plan, validation_set
from vswin_dist.errors import DataError
from vswin_dist.manifest import check_same_classes

COMPOSED = "caf\u00e9"
DECOMPOSED = "cafe\u0301"
assert unicodedata.normalize("NFC", DECOMPOSED) == COMPOSED != DECOMPOSED


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    return root


def listed(tmp: Path, *lines: str, names: list[str] | None = None) -> list[tuple[str, str, str]]:
    """Source id, class and file of every item of a list over `tmp/v`."""
    (tmp / "list.txt").write_text("\n".join(lines) + "\n")
    items = ListSource(str(tmp / "list.txt"), str(tmp / "v"), names or []).listing().items
    return [(i.source_id, i.class_name, os.path.relpath(i.url, tmp / "v") if i.url else "") for i in items]


@pytest.mark.parametrize(
    "line",
    [
        "a/one two.mp4 0",
        "a/one two.mp4\t0",
        "a/one two.mp4,0",
        "a/one two.mp4, 0",
        "a/one two.mp4;0",
        '"a/one two.mp4",0',
        "./a//one two.mp4 0",
        "a/./one two.mp4 0",
        "a\\one two.mp4 0",
        "ROOT/v/a/one two.mp4 0",
        "ROOT/./v//a/one two.mp4,0",
        "file://ROOT/v/a/one two.mp4 0",
        "ROOT/link/a/one two.mp4 0",
        "a/one two.mp4 250 0",
        "a/one two.mp4\t250\t0",
        "a/one two.mp4,250,0",
        "  a/one two.mp4   0  ",
    ],
)
def test_a_line_of_a_list(line: str, tmp_path: Path) -> None:
    touch(tmp_path / "v", "a/one two.mp4", "b.mp4")
    (tmp_path / "link").symlink_to(tmp_path / "v")
    wanted = [("a/one two.mp4", "0", "a/one two.mp4"), ("b.mp4", "1", "b.mp4")]
    assert listed(tmp_path, line.replace("ROOT", str(tmp_path)), "b.mp4 1") == wanted


def test_names_that_end_in_a_number_are_names_where_there_is_such_a_file(tmp_path: Path) -> None:
    touch(tmp_path / "v", "take 3", "take.mp4", "take.mp4 7", "bare")
    assert [i[0] for i in listed(tmp_path, "take 3 0", "take.mp4 9 0", "take.mp4 7 0", "bare 30 0")] == [
        "take 3",
        "take.mp4",
        "take.mp4 7",
        "bare",
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("a.mp4 10 40 0", "line 2: .* more than one number"),
        ("/elsewhere/a.mp4 0", "line 2: path '/elsewhere/a.mp4' leaves the video folder"),
        ("../a.mp4 0", "line 2: path .* leaves"),
        ("s3://bucket/a.mp4 0", "line 2: path .* leaves"),
        ("b.mp4 1", r"line 2: 'b.mp4' has class '1', in an earlier row '0'"),
        ("a.mp4", "line 2: 'a.mp4' is not 'path label_id'"),
        ("a.mp4 -1", "line 2: 'a.mp4 -1' is not"),
        ("a.mp4 900000000", "line 2: 'a.mp4' has class id 900000000, which makes 900,000,001 classes of 2 rows"),
        ("a.mp4 2", "line 2: 'a.mp4' has class id 2, which makes 3 classes of 2 rows"),
        ("a.mp4 " + "9" * 5000, "line 2"),
    ],
)
def test_a_line_that_is_refused(line: str, text: str, tmp_path: Path) -> None:
    touch(tmp_path / "v", "a.mp4", "b.mp4")
    with pytest.raises(DataError, match=text):
        listed(tmp_path, "b.mp4 0", line)


def test_a_class_id_that_the_class_list_does_not_have_is_named_with_its_line(tmp_path: Path) -> None:
    touch(tmp_path / "v", "a.mp4", "b.mp4")
    with pytest.raises(DataError, match=r"line 2: 'a\.mp4' has class id 900000000, --classes gives 2 names"):
        listed(tmp_path, "b.mp4 0", "a.mp4 900000000", names=["x", "y"])


@pytest.mark.slow
def test_a_row_that_stands_twice_is_said_once_and_kept_once(tmp_path: Path) -> None:
    make_video(tmp_path / "v" / "a.mp4", frames=3)
    make_video(tmp_path / "v" / "b.mp4", frames=3, seed=1)
    (tmp_path / "list.txt").write_text(f"a.mp4 0\nb.mp4 1\n./a.mp4 0\n{tmp_path}/v/a.mp4 0\nb.mp4 1\n")
    source = ListSource(str(tmp_path / "list.txt"), str(tmp_path / "v"), [])
    assert source.listing().notes == [
        f"{tmp_path}/list.txt: 3 rows stand twice and are kept once: 'a.mp4', 'a.mp4', 'b.mp4'"
    ]
    assert sorted(s.source_id for s in prepare(source, tmp_path / "out", COPY).samples) == ["a.mp4", "b.mp4"]
    (tmp_path / "i.csv").write_text("path,label\na.mp4,x\n./a.mp4,x\n")
    assert len(CsvSource(str(tmp_path / "i.csv"), str(tmp_path / "v"), "path", "label", {}).listing().items) == 1


def test_classes_without_a_video_are_said(tmp_path: Path) -> None:
    make_video(tmp_path / "v" / "a.mp4", frames=3)
    make_video(tmp_path / "v" / "b.mp4", frames=3, seed=1)
    (tmp_path / "list.txt").write_text("a.mp4 1\nb.mp4 2\ngone.mp4 3\nalso.mp4 3\n")
    notes: list[str] = []
    for names in ([], ["p", "q", "r", "s"]):
        source = ListSource(str(tmp_path / "list.txt"), str(tmp_path / "v"), names)
        notes += list_source(source, str(tmp_path / "out"), COPY, None, None).listing.notes
    assert notes == [
        f"{tmp_path}/list.txt: the class ids begin at 1; the first class has id 0",
        "2 of 4 classes have no video: '0', '3'",
        "2 of 4 classes have no video: 'p', 's'",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "files"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_rows_and_files_meet_in_any_form(rows: str, files: str, tmp_path: Path) -> None:
    """By csv, by list and by Kinetics csv, from a folder and from an archive; classes by a class list."""
    path = make_video(tmp_path / "v" / f"{files}" / f"{files}.mp4", frames=3)
    (tmp_path / "i.csv").write_text(f"path,label,{files}\n{rows}/{rows}.mp4,{rows},{rows}\n")
    index = CsvSource(str(tmp_path / "i.csv"), str(tmp_path / "v"), "path", "label", {rows: [files]})
    (tmp_path / "l.txt").write_text(f"{rows}/{rows}.mp4 0\n")
    (tmp_path / "k.csv").write_text(f"label,youtube_id\n{rows},{rows}\n")
    tar = tar_of(tmp_path / "k.tar", [(f"x/{files}.mp4", path.read_bytes())])
    sources = {
        "csv": index,
        "list": ListSource(str(tmp_path / "l.txt"), str(tmp_path / "v"), [files]),
        "folder": KineticsSource(str(tmp_path / "k.csv"), str(tmp_path / "v")),
        "archive": KineticsSource(str(tmp_path / "k.csv"), str(tar)),
    }
    for name, source in sources.items():
        manifest = prepare(source, tmp_path / name, COPY, classes=["other", files])  # type: ignore[arg-type]
        assert (len(manifest.samples), len(manifest.rejected)) == (1, 0), name
        assert manifest.classes == ["other", files] and manifest.samples[0].class_id == 1
        with tarfile.open(tmp_path / name / "shard-00000.tar") as shard:
            member = shard.extractfile(f"{manifest.samples[0].key}.json") or pytest.fail("no member")
            assert json.loads(member.read())["label"] == files
        assert json.loads((tmp_path / name / "report.json").read_text())["videos_without_row"] == []


@pytest.mark.slow
def test_folders_of_two_forms_are_one_class_and_one_form_stays_as_it_is(tmp_path: Path) -> None:
    make_video(tmp_path / "v" / COMPOSED / "a.mp4", frames=3)
    make_video(tmp_path / "v" / DECOMPOSED / "b.mp4", frames=3, seed=1)
    manifest = prepare(FolderSource(str(tmp_path / "v")), tmp_path / "out", COPY)
    assert manifest.classes == [COMPOSED] and len(manifest.samples) == 2
    (tmp_path / "v" / COMPOSED / "a.mp4").rename(tmp_path / "v" / DECOMPOSED / "a.mp4")
    (tmp_path / "v" / COMPOSED).rmdir()
    assert prepare(FolderSource(str(tmp_path / "v")), tmp_path / "mac", COPY).classes == [DECOMPOSED]


@pytest.mark.slow
def test_a_set_is_repaired_from_a_source_that_now_writes_its_names_otherwise(tmp_path: Path) -> None:
    make_video(tmp_path / "v" / DECOMPOSED / f"{DECOMPOSED}.mp4", frames=3)
    manifest = prepare(FolderSource(str(tmp_path / "v")), tmp_path / "out", COPY)
    before = tars(tmp_path / "out")
    (tmp_path / "v" / DECOMPOSED).rename(tmp_path / "v" / COMPOSED)
    (tmp_path / "v" / COMPOSED / f"{DECOMPOSED}.mp4").rename(tmp_path / "v" / COMPOSED / f"{COMPOSED}.mp4")
    (tmp_path / "out" / "shard-00000.tar").unlink()
    assert repair(str(tmp_path / "out"), 1, False)[0] == ["shard-00000.tar"]
    assert tars(tmp_path / "out") == before and verify_dataset(str(tmp_path / "out"), 1, False) == {}
    assert manifest.samples[0].source_id == f"{DECOMPOSED}/{DECOMPOSED}.mp4"


def test_class_lists_are_the_same_in_any_form(tmp_path: Path) -> None:
    check_same_classes([COMPOSED, "b"], [DECOMPOSED, "b"], "x")
    with pytest.raises(DataError, match="class 1"):
        check_same_classes([COMPOSED, "b"], [DECOMPOSED, "c"], "x")
    make_video(tmp_path / "v" / COMPOSED / "a.mp4", frames=3)
    make_video(tmp_path / "v" / "b" / "b.mp4", frames=3, seed=1)
    manifest = prepare(FolderSource(str(tmp_path / "v")), tmp_path / "out", COPY)
    out = str(tmp_path / "out")
    data = DataSettings(
        train=out, val=out, sampling="dense", frames=4, stride=2, size=32, short_side=40, classes=(DECOMPOSED,)
    )
    assert make_plan(manifest, data, 0, 1).steps_per_epoch == 1
    assert len((validation_set(data) or pytest.fail("none")).samples) == 1
