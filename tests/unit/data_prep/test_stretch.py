"""Rows that mean a stretch of a longer film: frame by frame, several of one film, names that hold the times, refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_prep.encode import process, verify
from data_prep.pipeline import shard_dataset
from data_prep.repair import repair
from data_prep.retry import retry
from data_prep.settings import Encoding, PrepSettings
from data_prep.sources.csv_index import CsvSource
from data_prep.sources.kinetics import KineticsSource
from data_prep.stretch import Stretch, parse_stretch
from data_prep.verify import verify_dataset
from tests.unit.data_prep.inprocess import COPY, InProcess, prepare, tars
from tests.unit.data_prep.test_sources import tar_of
from tests.unit.data_prep.videos import make_video, picture
from vswin_dist.errors import DataError, WorkFailed
from vswin_dist.manifest import Manifest

FRAMES, RATE, SIZE = 58, 10, (192, 128)  # the square of `picture` stands elsewhere in each of them
ARCHIVE = PrepSettings(Encoding(profile="archive", crf=12), shard_count=2)
PICTURES = np.stack([picture(i, *SIZE, 0) for i in range(FRAMES)]).astype(np.int16)


def film(path: Path, **more: Any) -> Path:
    return make_video(path, **{"frames": FRAMES, "rate": RATE, "size": SIZE, **more})


def numbers(data: bytes) -> list[int]:
    """Which of the film's pictures the frames of `data` show."""
    with av.open(io.BytesIO(data)) as video:
        frames = [f.to_ndarray(format="rgb24").astype(np.int16) for f in video.decode(video=0)]
    return [int(np.abs(PICTURES - frame).mean(axis=(1, 2, 3)).argmin()) for frame in frames]


def shown(out: Path, manifest: Manifest) -> dict[str, list[int]]:
    """The same of every sample of a set."""
    found = {}
    for s in manifest.samples:
        data = (out / manifest.shards[s.shard].url).read_bytes()[s.offset : s.offset + s.size]
        found[s.source_id] = numbers(data)
        assert s.frames == len(found[s.source_id])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["train", "archive"])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("a.mp4", {}),
        ("a.mkv", {"times": [5000 + 100 * i for i in range(FRAMES)]}),
        ("a.ts", {}),
        ("a.avi", {"codec": "mpeg4"}),
        ("b.avi", {"codec": "libx264"}),  # frames out of order in a container that has no times for them
        ("a.h264", {}),  # no times at all
        ("a.gif", {"codec": "gif", "pixels": "rgb8"}),
        ("a.mp4", {"options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("a.webm", {"codec": "libvpx-vp9"}),
    ],
)
def test_a_stretch_has_exactly_its_frames(name: str, more: dict[str, Any], profile: str, tmp_path: Path) -> None:
    data = film(tmp_path / name, **more).read_bytes()
    for start, end, wanted in [
        (1.0, 2.5, range(10, 25)),
        (0, 0.3, range(3)),
        (3.25, 4.15, range(33, 42)),
        (5, 9, range(50, 58)),
    ]:
        outcome, made = process(data, Encoding(profile=profile, short_side=128, crf=12), name, Stretch(start, end))
        assert outcome.kept, outcome
        assert numbers(made) == list(wanted)
        assert outcome.frames == len(wanted)
        if name not in ("b.avi", "a.h264"):  # which have no times of their own
            assert outcome.duration == pytest.approx(len(wanted) / RATE, abs=0.01)
        with av.open(io.BytesIO(made)) as video:
            assert next(video.decode(video=0)).time == 0


def test_times_count_from_the_start_of_the_film_where_its_picture_begins_later(tmp_path: Path) -> None:
    """Sound from 0 s, the picture from 2 s: second 3 shows the picture's eleventh frame, as in players."""
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        video: Any = out.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        sound: Any = out.add_stream("aac", rate=16000)
        for n in range(40):
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 3200), dtype=np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 16000, 3200 * n
            out.mux(sound.encode(tone))
        for n in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(n, *SIZE, 0), format="rgb24")
            frame.pts = n + 2 * RATE
            out.mux(video.encode(frame))
        out.mux([*video.encode(None), *sound.encode(None)])
    made = process((tmp_path / "a.mkv").read_bytes(), ARCHIVE.encoding, "a.mkv", Stretch(3, 4))[1]
    assert numbers(made) == list(range(10, 20))


def test_damage_after_the_stretch_does_not_count_and_a_film_that_breaks_off_does(tmp_path: Path) -> None:
    data = bytearray(film(tmp_path / "a.mp4", options={"movflags": "faststart"}).read_bytes())
    assert verify(bytes(data[:-400]) + b"\x5a" * 400, ARCHIVE.encoding, "", Stretch(0, 1)).frames == 10
    assert process(bytes(data[: len(data) * 3 // 4]), ARCHIVE.encoding, "", Stretch(0, 1))[0].verdict == "truncated"


def csv_of(tmp: Path, rows: list[str], header: str = "path,label,start,end", **more: Any) -> CsvSource:
    (tmp / "i.csv").write_text("\n".join([header, *rows]) + "\n")
    return CsvSource(str(tmp / "i.csv"), str(tmp / "v"), "path", "label", {}, **more)


ROWS = ["f.mp4,a,1,2", "f.mp4,b,2,3.5", "f.mp4,a,00:00:04,0:05", "f.mp4,a,3.5,", "g_000001_000003.mp4,b,1,3", "h.mp4,b,,"]
WANTED = {
    "f.mp4#t=1,2": list(range(10, 20)),
    "f.mp4#t=2,3.5": list(range(20, 35)),
    "f.mp4#t=4,5": list(range(40, 50)),
    "f.mp4#t=3.5": list(range(35, 58)),
    "g_000001_000003.mp4": list(range(20)),  # the file is the stretch
    "h.mp4": list(range(12)),  # no times
}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    film(tmp_path / "v" / "f.mp4")
    film(tmp_path / "v" / "g_000001_000003.mp4", frames=20)
    film(tmp_path / "v" / "h.mp4", frames=12)
    return tmp_path


@pytest.mark.slow
def test_several_rows_of_one_film(videos: Path) -> None:
    """Unique keys, no duplicates of one another, the same bytes after any stops; verify, repair and retry know them."""
    source = csv_of(videos, ROWS)
    first = prepare(source, videos / "a", ARCHIVE)
    assert shown(videos / "a", first) == WANTED and not first.rejected
    assert len({s.key for s in first.samples}) == 6 and not any("." in s.key for s in first.samples)
    ran: list[Any] = []
    for attempt in range(50):
        pool = InProcess(backwards=attempt % 2 == 0, stop_after=1)
        try:
            prepare(source, videos / "b", ARCHIVE, executor=pool)
            break
        except WorkFailed:
            ran += pool.ran
    assert len(ran) == len(set(ran)) >= 8, "finished work was repeated"
    assert tars(videos / "a") == tars(videos / "b")
    assert (videos / "a" / "manifest.json").read_bytes() == (videos / "b" / "manifest.json").read_bytes()
    assert verify_dataset(str(videos / "a"), 1, False) == {}
    (videos / "b" / "shard-00001.tar").unlink()
    assert repair(str(videos / "b"), 1, False)[0] == ["shard-00001.tar"]
    assert tars(videos / "a") == tars(videos / "b")
    (videos / "v" / "f.mp4").rename(videos / "film")
    short = prepare(source, videos / "c", ARCHIVE)
    assert short.counts["reasons"] == {"missing_video": 4}
    (videos / "film").rename(videos / "v" / "f.mp4")
    assert shown(videos / "c", retry(str(videos / "c"), 1, False)) == WANTED


def test_rows_that_mean_the_same_stretch_are_kept_once(videos: Path) -> None:
    listing = csv_of(videos, ["f.mp4,a,1,2", "./f.mp4,a,1.0,00:02", "f.mp4,a,1,3"]).listing()
    assert [i.source_id for i in listing.items] == ["f.mp4#t=1,2", "f.mp4#t=1,3"]
    assert listing.notes[0] == f"{videos}/i.csv: 1 rows stand twice and are kept once: 'f.mp4#t=1,2'"
    with pytest.raises(DataError, match=r"line 3: 'f\.mp4#t=1,2' has class 'b', in an earlier row 'a'"):
        csv_of(videos, ["f.mp4,a,1,2", "f.mp4,b,1,2"]).listing()


def test_the_columns_of_the_times(videos: Path) -> None:
    def ids(source: CsvSource) -> list[str]:
        return [i.source_id for i in source.listing().items]

    rows = ["f.mp4,a,1,2"]
    for header in ("path,label,start,end", "path,label,time_start,time_end", "path,label,start_time,end_time"):
        assert ids(csv_of(videos, rows, header)) == ["f.mp4#t=1,2"]
        assert ids(csv_of(videos, rows, header, start_column="")) == ["f.mp4"]
    assert ids(csv_of(videos, rows, "path,label,start,stop")) == ["f.mp4"]
    assert ids(csv_of(videos, rows, "path,label,from,to", start_column="from", end_column="to")) == ["f.mp4#t=1,2"]
    assert ids(csv_of(videos, rows, "path,label,from,to", start_column="from")) == ["f.mp4#t=1"]
    assert ids(csv_of(videos, ["0,f.mp4,a"], ",path,label")) == ["f.mp4"]
    with pytest.raises(DataError, match=r"no column 'form'.*Did you mean 'from'"):
        csv_of(videos, rows, "path,label,from,to", start_column="form").listing()


@pytest.mark.parametrize(("start", "end"), [("2", "1"), ("1", "1"), ("x", "2"), ("-1", "2"), ("nan", "2"), ("1:2:3:4", "")])
def test_times_that_are_none_are_refused_with_their_line(start: str, end: str, videos: Path) -> None:
    with pytest.raises(DataError, match=r"i\.csv, line 3: start"):
        csv_of(videos, ["f.mp4,a,1,2", f"f.mp4,a,{start},{end}"]).listing()
    if start and end:
        (videos / "k.csv").write_text(f"label,youtube_id,time_start,time_end\na,f,1,2\na,f,{start},{end}\n")
        with pytest.raises(DataError, match=r"k\.csv, line 3: f has times"):
            KineticsSource(str(videos / "k.csv"), str(videos / "v")).listing()


def test_times_are_seconds_or_have_colons() -> None:
    assert parse_stretch("1:02:03.5", "1:02:04") == Stretch(3723.5, 3724)
    assert parse_stretch("0", "") is None and parse_stretch("", "") is None
    assert str(Stretch(0.1, 12345.678)) == "0.1,12345.678" and str(Stretch(10)) == "10"


KINETICS = """label,youtube_id,time_start,time_end,split
a,abcdefghijk,1,2,train
b,abcdefghijk,2.2,3.5,train
b,abcdefghijk,2.4,3.9,train
a,ABCDEFGHIJK,10,12,train
b,gonegonegon,0,10,train
"""
OF_KINETICS = {
    "abcdefghijk_000001_000002": list(range(10, 20)),
    "abcdefghijk_000002_000003": list(range(22, 35)),
    "abcdefghijk_000002_000003#t=2.4,3.9": list(range(24, 39)),
    "ABCDEFGHIJK_000010_000012": list(range(20)),
}


@pytest.mark.slow
def test_rows_of_kinetics_in_folders_and_archives(videos: Path) -> None:
    (videos / "k.csv").write_text(KINETICS)
    whole = (videos / "v" / "f.mp4").read_bytes()
    clip = (videos / "v" / "g_000001_000003.mp4").read_bytes()
    (videos / "k").mkdir()
    (videos / "k" / "abcdefghijk.mp4").write_bytes(whole)
    (videos / "k" / "ABCDEFGHIJK_000010_000012.mp4").write_bytes(clip)
    tar_of(
        videos / "part_0.tar", [("x/ABCDEFGHIJK_000010_000012.mp4", clip), ("x/abcdefghijk.mp4", whole), ("x/z.mp4", b"")]
    )
    settings = PrepSettings(ARCHIVE.encoding, shard_count=2, window=2)
    for place in ("k", "part_0.tar"):
        source = KineticsSource(str(videos / "k.csv"), str(videos / place))
        first = prepare(source, videos / f"out-{place}", settings)
        assert shown(videos / f"out-{place}", first) == OF_KINETICS
        assert [r.source_id for r in first.rejected] == ["gonegonegon_000000_000010"]
        ran: list[Any] = []
        for attempt in range(50):
            pool = InProcess(backwards=attempt % 2 == 0, stop_after=1)
            try:
                prepare(source, videos / f"again-{place}", settings, executor=pool)
                break
            except WorkFailed:
                ran += pool.ran
        assert len(ran) == len(set(ran)), "finished work was repeated"
        assert tars(videos / f"again-{place}") == tars(videos / f"out-{place}")
        assert json.loads((videos / f"again-{place}" / "report.json").read_text())["notes"] == []
        (videos / f"again-{place}" / "shard-00000.tar").unlink()
        assert repair(str(videos / f"again-{place}"), 1, False)[0] == ["shard-00000.tar"]
        assert tars(videos / f"again-{place}") == tars(videos / f"out-{place}")


@pytest.mark.slow
def test_copy_refuses_what_it_cannot_cut(videos: Path) -> None:
    rows = ["f.mp4,a,1,2", "f.mp4,a,0,5.8", "g_000001_000003.mp4,b,1,3", "h.mp4,b,0,1.2", "h.mp4,b,0.5,2"]
    manifest = prepare(csv_of(videos, rows), videos / "out", COPY)
    assert shown(videos / "out", manifest) == {
        "f.mp4#t=0,5.8": list(range(58)),
        "g_000001_000003.mp4": list(range(20)),
        "h.mp4#t=0,1.2": list(range(12)),
    }
    assert {(r.source_id, r.reason) for r in manifest.rejected} == {("f.mp4#t=1,2", "not_cut"), ("h.mp4#t=0.5,2", "not_cut")}
    assert "--profile train or archive" in manifest.rejected[0].detail


@pytest.mark.slow
def test_a_stretch_outside_its_film_is_a_verdict(videos: Path) -> None:
    manifest = prepare(csv_of(videos, ["f.mp4,a,1,2", "f.mp4,a,60,70"]), videos / "out", ARCHIVE)
    assert [(r.reason, r.detail) for r in manifest.rejected] == [
        ("outside_film", "the row means 60,70 s of a film whose last frame is at 5.70 s")
    ]


@pytest.mark.slow
def test_what_is_odd_about_a_kept_video_is_said(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also by a run that continues another, in whose shards it is."""
    film(videos / "v" / "i_000010_000012.mp4")
    film(videos / "v" / "j.mp4", frames=30, seed=1)
    rows = ["g_000001_000003.mp4,a,1,3", "i_000010_000012.mp4,b,10,12", "j.mp4,b,20,23", "f.mp4,a,5,7"]
    source = csv_of(videos, rows)
    notes = {
        "i_000010_000012.mp4 lasts 5.8 s, its row means 2 s (10,12)",
        "j.mp4#t=20,23 lasts 3.0 s and its row means 3 s (20,23): taken for that stretch itself",
        "f.mp4#t=5,7 lasts only 0.8 s, its row means 2 s (5,7)",
        f"{videos}/i.csv: 2 rows mean a stretch, by the columns start and end; "
        '--start-column "" takes the files as they are',
    }
    for _ in range(50):
        try:
            prepare(source, videos / "out", ARCHIVE, executor=InProcess(stop_after=1))
            break
        except WorkFailed:
            pass
    assert set(json.loads((videos / "out" / "report.json").read_text())["notes"]) == notes
    assert "10,12" in (videos / "out" / "report.html").read_text()
    shard_dataset(source, str(videos / "said"), ARCHIVE, executor=InProcess, show_progress=True)
    said = capsys.readouterr().err
    assert all(f"note: {note}" in said for note in notes)
