"""Journals of interrupted runs, written by the version before the journal's names changed, resume to the same bytes."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_prep import journal
from data_prep.settings import Encoding, PrepSettings
from data_prep.sources.folder import FolderSource
from data_prep.sources.kinetics import KineticsSource
from tests.unit.data_prep.inprocess import InProcess, prepare, tars
from vswin_dist.errors import DataError
from vswin_dist.manifest import read_manifest

EARLIER: dict[str, Any] = json.loads((Path(__file__).parent / "earlier_journals.json").read_text())
GIF = base64.b64decode(EARLIER["gif"])  # two frames; what follows its end makes videos of one's own of it
SETTINGS = PrepSettings(Encoding(profile="copy"), shard_count=2, window=2)
IDS = [letter * 11 for letter in "abcdef"]


def folder_source(root: Path) -> FolderSource:
    for n in range(6):
        path = root / "in" / f"c{n % 2}" / f"v{n}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(GIF + bytes([n]))
    (root / "in" / "c0" / "broken.gif").write_text("no video")
    return FolderSource(str(root / "in"))


def kinetics_source(root: Path) -> KineticsSource:
    rows = "".join(f"c{n % 2},{i},{n},{n + 10},val,0\n" for n, i in enumerate(IDS))
    (root / "k.csv").write_text("label,youtube_id,time_start,time_end,split,is_cc\n" + rows)
    (root / "parts").mkdir()
    for part, numbers in enumerate([range(3), range(3, 5)]):
        with tarfile.open(root / "parts" / f"part_{part}.tar", "w") as tar:
            for name, data in [(f"{IDS[n]}_{n:06d}_{n + 10:06d}.gif", GIF + bytes([n])) for n in numbers]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            if part == 0:
                info = tarfile.TarInfo("stranger.gif")
                tar.addfile(info)
    return KineticsSource(str(root / "k.csv"), str(root / "parts"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("folder", [("video", 4), ("video", 5), ("video", 6), ("shard", 1), ("shard", 2)]),  # 3 is staged
        ("kinetics", [("video", 3), ("video", 4), ("shard", 1), ("shard", 2)]),  # 2 is staged, 5 is missing
    ],
)
def test_an_earlier_journal_resumes(kind: str, left: list[tuple[str, int]], tmp_path: Path) -> None:
    source: Any = folder_source(tmp_path) if kind == "folder" else kinetics_source(tmp_path)
    whole = prepare(source, tmp_path / "whole", SETTINGS)
    out = tmp_path / "out"
    for name, text in EARLIER[kind].items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        data = text.replace("ROOT", str(tmp_path)).encode("latin-1").replace(b"GIF", GIF)
        (out / name).write_bytes(data)
    (out / "shard-00000.tar").write_bytes((tmp_path / "whole" / "shard-00000.tar").read_bytes())
    pool = InProcess()
    assert prepare(source, out, SETTINGS, executor=pool) == whole == read_manifest(str(out))
    assert sorted(pool.ran) == sorted(left)
    assert tars(out) == tars(tmp_path / "whole")
    for name in ("manifest.json", "report.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "kinetics"])
def test_the_journal_is_still_written_as_it_was(kind: str, tmp_path: Path) -> None:
    source: Any = folder_source(tmp_path) if kind == "folder" else kinetics_source(tmp_path)
    prepare(source, tmp_path / "out", SETTINGS)
    for name, text in EARLIER[kind].items():
        if "staging" not in name:
            assert (tmp_path / "out" / name).read_text() == text.replace("ROOT", str(tmp_path)), name


def test_a_damaged_record_of_the_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / ".data-prep" / "records").mkdir(parents=True)
    (tmp_path / ".data-prep" / "records" / "00000000.json").write_text('{"number": 0, "start": 0, "end": 4}')
    with pytest.raises(DataError, match=r"records/00000000\.json is not a valid record of a shard: shard is missing"):
        journal.read_ranges(str(tmp_path))
