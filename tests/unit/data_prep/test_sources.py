"""How each kind of source matches rows and videos: Kinetics, SSv2, plain lists; in folders and in archives."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from data_prep import archive, cli, sources
from data_prep.order import order_key
from data_prep.settings import PrepSettings
from data_prep.sources.kinetics import KineticsSource
from data_prep.sources.path_list import ListSource
from data_prep.sources.ssv2 import Ssv2Source
from tests.unit.data_prep.inprocess import COPY, InProcess, prepare, tars
from tests.unit.data_prep.videos import make_video
from vswin_dist.errors import DataError, WorkFailed

IDS = ["-_dash_star", "abcdefghijk", "ABCDEFGHIJK", "zz_zz_zz_zz", "0123456789_", "gonegonegon"]
REAL = Path(os.environ.get("VSWIN_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data") / "labels"
needs_labels = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real annotation files: VSWIN_DATA or {REAL}")


def kinetics_csv(path: Path) -> Path:
    rows = [
        f"{label},{i},{10 * n},{10 * n + 10},val,0"
        for n, (label, i) in enumerate(zip(["abseiling", '"air drumming"'] * 3, IDS, strict=True))
    ]
    path.write_text("label,youtube_id,time_start,time_end,split,is_cc\n" + "\n".join(rows) + "\n")
    return path


def tar_of(path: Path, members: list[tuple[str, bytes]], extra: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra or []:
            tar.addfile(info)
    return path


def video(tmp: Path, seed: int) -> bytes:
    return make_video(tmp / f"render-{seed}.mp4", frames=3, size=(48, 32), seed=seed).read_bytes()


def test_kinetics_rows_find_their_videos_under_every_name(tmp_path: Path) -> None:
    videos = tmp_path / "v"
    for name in (
        "air_drumming/abcdefghijk.mp4",
        "-_dash_star_000000_000010.mp4",
        "abseiling/ABCDEFGHIJK_000020_000030.mkv",
        "zz_zz_zz_zz_000099_000109.mp4",
        "replacement_for_corrupted/0123456789__x.mp4",
        "val/0123456789__000040_000050.mp4",
        "stranger.mp4",
    ):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_text("x")
    listing = KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(videos)).listing()
    found = {i.source_id: i.url.removeprefix(str(videos) + "/") for i in listing.items}
    assert found == {
        "-_dash_star_000000_000010": "-_dash_star_000000_000010.mp4",
        "abcdefghijk_000010_000020": "air_drumming/abcdefghijk.mp4",
        "ABCDEFGHIJK_000020_000030": "abseiling/ABCDEFGHIJK_000020_000030.mkv",
        "zz_zz_zz_zz_000030_000040": "",  # the film is there, but another ten seconds of it
        "0123456789__000040_000050": "replacement_for_corrupted/0123456789__x.mp4",
        "gonegonegon_000050_000060": "",
    }
    assert sorted(listing.unlabelled) == [
        "stranger.mp4",
        "val/0123456789__000040_000050.mp4",
        "zz_zz_zz_zz_000099_000109.mp4",
    ]
    assert {i.class_name for i in listing.items} == {"air drumming", "abseiling"}


@pytest.mark.parametrize("kind", ["kinetics", "ssv2"])
def test_a_folder_without_one_of_the_videos_is_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "stranger.mp4").write_text("x")
    if kind == "kinetics":
        source: Any = KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(tmp_path / "v"))
    else:
        source = Ssv2Source(videos=str(tmp_path / "v"), **ssv2_files(tmp_path))
    with pytest.raises(
        DataError, match=r"none of the \d videos of .* is below .*/v, .*there lie for instance 'stranger.mp4'"
    ):
        prepare(source, tmp_path / "out", COPY)
    assert not (tmp_path / "out").exists()


BESIDE = [".json", ".jpg", ".m4a", ".mp3", ".vtt", ".part", ".mp4.part"]


def test_files_beside_a_video_do_not_take_its_place(tmp_path: Path) -> None:
    for name in ("abcdefghijk_000010_000020", "7"):
        (tmp_path / "v").mkdir(exist_ok=True)
        for ending in (*BESIDE, ".webm"):
            (tmp_path / "v" / f"{name}{ending}").write_text("x")
    kinetics = KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(tmp_path / "v")).listing()
    ssv2 = Ssv2Source(videos=str(tmp_path / "v"), **ssv2_files(tmp_path)).listing()
    for listing, url in ((kinetics, "abcdefghijk_000010_000020.webm"), (ssv2, "7.webm")):
        assert [i.url for i in listing.items if i.url] == [str(tmp_path / "v" / url)]
        assert len(listing.unlabelled) == 2 * len(BESIDE) + 1


@pytest.mark.parametrize("kind", ["kinetics", "ssv2"])
def test_members_beside_a_video_do_not_take_its_place(kind: str, tmp_path: Path) -> None:
    name = "abcdefghijk_000010_000020" if kind == "kinetics" else "7"
    members = [(f"v/{name}{ending}", b"x") for ending in BESIDE]
    tar_of(tmp_path / "a.tar", [*members, (f"v/{name}.mp4", video(tmp_path, 1))])
    if kind == "kinetics":
        source: Any = KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(tmp_path / "a.tar"))
    else:
        source = Ssv2Source(videos=str(tmp_path / "a.tar"), **ssv2_files(tmp_path))
    assert [s.source_id for s in prepare(source, tmp_path / "out", COPY).samples] == [name]


def test_kinetics_test_csv_without_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("youtube_id,time_start,time_end,split\nabc,1,2,test\n")
    with pytest.raises(DataError, match="no column 'label'"):
        KineticsSource(str(tmp_path / "t.csv"), str(tmp_path)).listing()


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    folder.mkdir()
    named = [(f"val/{i}_{10 * n:06d}_{10 * n + 10:06d}.mp4", video(tmp_path, n)) for n, i in enumerate(IDS[:5])]
    tar_of(folder / "part_2.tar.gz", named[:3])
    tar_of(folder / "part_10.tar.gz", [*named[3:], ("val/stranger.mp4", b"x"), ("val/._hidden", b"x")])
    tar_of(folder / "replacement_for_corrupted_k400.tgz", [(f"{IDS[1]}_other.mp4", video(tmp_path, 77))])
    return folder


@pytest.mark.slow
def test_archives_give_the_same_bytes_after_any_stops(archives: Path, tmp_path: Path) -> None:
    source = KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(archives))
    settings = PrepSettings(COPY.encoding, shard_count=2, window=2)
    first = prepare(source, tmp_path / "a", settings)
    assert first.counts == {"read": 6, "kept": 5, "rejected": 1, "reasons": {"missing_video": 1}}
    assert first.rejected[0].source_id == "gonegonegon_000050_000060"
    replaced = next(s for s in first.samples if s.source_id.startswith(IDS[1]))
    assert (tmp_path / "a" / first.shards[replaced.shard].url).read_bytes()[
        replaced.offset : replaced.offset + replaced.size
    ] == video(tmp_path, 77)
    assert first.samples[0] == replaced, "the replacements come first"
    ran: list[Any] = []
    for attempt in range(50):
        pool = InProcess(backwards=attempt % 2 == 0, stop_after=1)
        try:
            prepare(source, tmp_path / "b", settings, executor=pool)
            break
        except WorkFailed:
            ran += pool.ran
    ran += pool.ran
    assert len(ran) == len(set(ran)), "finished work was repeated"
    assert tars(tmp_path / "a") == tars(tmp_path / "b")
    assert prepare(source, tmp_path / "c", settings, executor=InProcess(backwards=True)) == first


@pytest.mark.slow
def test_archives_are_shuffled_within_their_windows(archives: Path, tmp_path: Path) -> None:
    source = KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(archives))
    came = {2: [0, 2], 10: [3, 4]}  # row 1 came before, with the replacements
    for window in (1, 100):
        manifest = prepare(source, tmp_path / str(window), PrepSettings(COPY.encoding, window=window, seed=1))
        rows = [IDS.index(s.source_id[:11]) for s in manifest.samples]
        shuffled = {
            part: sorted(ns, key=lambda n: order_key(1, f"{IDS[n]}_{10 * n:06d}_{10 * n + 10:06d}"))
            for part, ns in came.items()
        }
        assert shuffled != came
        assert rows == [1, *((came if window == 1 else shuffled)[2]), *((came if window == 1 else shuffled)[10])]


@pytest.mark.slow
def test_a_finished_archive_is_not_read_again(archives: Path, tmp_path: Path) -> None:
    source = KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(archives))
    settings = PrepSettings(COPY.encoding, shard_count=2, window=2)
    first = prepare(source, tmp_path / "a", settings)
    (tmp_path / "a" / "manifest.json").unlink()
    for path in archives.iterdir():
        path.write_bytes(b"not needed any more")
    assert prepare(source, tmp_path / "a", settings, executor=InProcess(stop_after=0)) == first


def test_a_damaged_archive_stops_with_its_name(archives: Path, tmp_path: Path) -> None:
    part = archives / "part_2.tar.gz"
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(WorkFailed, match=r"part_2\.tar\.gz is damaged"):
        prepare(KineticsSource(str(kinetics_csv(tmp_path / "a.csv")), str(archives)), tmp_path / "out", COPY)


def test_unsafe_members_are_refused(tmp_path: Path) -> None:
    link, device, hard = (tarfile.TarInfo(n) for n in ("link.mp4", "device.mp4", "hard.mp4"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "ok.mp4"
    device.type = tarfile.CHRTYPE
    path = tar_of(
        tmp_path / "a.tar",
        [("/abs.mp4", b"1"), ("../up.mp4", b"2"), ("a/../../up.mp4", b"3"), ("C:\\x.mp4", b"4"), ("ok.mp4", b"5")],
        [link, hard, device],
    )
    found = {m.name: m.refusal or m.data for m in archive.members([str(path)], lambda _: True)}
    assert found == {
        "/abs.mp4": "absolute path",
        "../up.mp4": "path with '..'",
        "a/../../up.mp4": "path with '..'",
        "C:\\x.mp4": "absolute path",
        "ok.mp4": b"5",
        "link.mp4": "link",
        "hard.mp4": "link",
        "device.mp4": "not a regular file",
    }


def ssv2_files(tmp: Path) -> dict[str, str]:
    (tmp / "labels.json").write_text(json.dumps({"Zoom something": "0", "Approach something": "1"}))
    (tmp / "val.json").write_text(
        json.dumps(
            [
                {"id": "7", "label": "zoom a cup", "template": "Zoom [something]", "placeholders": ["a cup"]},
                {"id": "11", "label": "approach a", "template": "Approach [something]", "placeholders": ["a"]},
                {"id": "12", "label": "approach b", "template": "Approach [something]", "placeholders": ["b"]},
            ]
        )
    )
    return {"annotations": str(tmp / "val.json"), "labels": str(tmp / "labels.json"), "answers": ""}


def test_ssv2_classes_and_folder(tmp_path: Path) -> None:
    fields = ssv2_files(tmp_path)
    (tmp_path / "v").mkdir()
    for name in ("7.webm", "12.webm", "99.webm"):
        (tmp_path / "v" / name).write_text("x")
    listing = Ssv2Source(videos=str(tmp_path / "v"), **fields).listing()
    assert listing.classes == ["Zoom something", "Approach something"]
    assert [(i.source_id, i.class_name, bool(i.url)) for i in listing.items] == [
        ("7", "Zoom something", True),
        ("11", "Approach something", False),
        ("12", "Approach something", True),
    ]
    assert list(listing.unlabelled) == ["99.webm"]
    (tmp_path / "val.json").write_text('[{"id":"7"}]')
    with pytest.raises(DataError, match="--answers"):
        Ssv2Source(videos=str(tmp_path / "v"), **fields).listing()
    (tmp_path / "answers.csv").write_text("7;Zoom something\n")
    fields["answers"] = str(tmp_path / "answers.csv")
    assert Ssv2Source(videos=str(tmp_path / "v"), **fields).listing().items[0].class_name == "Zoom something"


@pytest.mark.parametrize(
    ("kind", "option", "sampling"),
    [
        ("ssv2", [], "uniform"),
        ("folder", [], "dense"),
        ("ssv2", ["--sampling", "dense"], "dense"),
        ("folder", ["--sampling", "uniform"], "uniform"),
    ],
)
def test_the_source_says_how_its_videos_are_sampled(kind: str, option: list[str], sampling: str) -> None:
    files = ["--annotations", "a", "--labels", "b"] if kind == "ssv2" else []
    arguments = cli.parser().parse_args(["shard", kind, *files, "--videos", "v", "--out", "o", *option])
    assert cli.settings_from(arguments).sampling == sampling


@pytest.mark.slow
def test_ssv2_from_the_pieces_of_one_tar_gz(tmp_path: Path) -> None:
    fields = ssv2_files(tmp_path)
    whole = tar_of(
        tmp_path / "all.tgz", [(f"20bn-something-something-v2/{n}.webm", video(tmp_path, n)) for n in (7, 12)]
    ).read_bytes()
    (tmp_path / "v").mkdir()
    for n, at in enumerate(range(0, len(whole), 700)):
        (tmp_path / "v" / f"20bn-something-something-v2-{n:02d}").write_bytes(whole[at : at + 700])
    for videos in (tmp_path / "v", tmp_path / "v" / "20bn-something-something-v2-??"):
        source = Ssv2Source(videos=str(videos), **fields)
        assert len(source.listing().archives) == 1
        manifest = prepare(source, tmp_path / f"out{len(str(videos))}", COPY)
        assert {s.source_id: s.class_id for s in manifest.samples} == {"7": 0, "12": 1}
        assert [r.source_id for r in manifest.rejected] == ["11"]


def test_plain_lists(tmp_path: Path) -> None:
    index, videos = tmp_path / "list.txt", tmp_path / "v"
    index.write_text("a/with space.mp4 1\nb.mp4 11\n")
    (videos / "a").mkdir(parents=True)
    (videos / "a" / "with space.mp4").write_text("x")
    names = [f"c{i}" for i in range(12)]
    listing = ListSource(str(index), str(videos), names).listing()
    assert [(i.source_id, i.class_name) for i in listing.items] == [("a/with space.mp4", "c1"), ("b.mp4", "c11")]
    assert listing.classes == names
    with pytest.raises(DataError, match="class id 11"):
        ListSource(str(index), str(videos), ["x", "y"]).listing()
    index.write_text("a.mp4 1 2.5\n")
    with pytest.raises(DataError, match="line 1"):
        ListSource(str(index), str(videos), []).listing()


def test_a_source_is_made_again_from_its_description(tmp_path: Path) -> None:
    for source in (KineticsSource("a", "b"), ListSource("a", "b", ["x"]), Ssv2Source("a", "b", "c", "")):
        assert sources.build(json.loads(json.dumps(sources.spec(source)))) == source


@pytest.mark.slow
@needs_labels
def test_the_real_annotation_files_against_an_almost_empty_folder(tmp_path: Path) -> None:
    started = time.monotonic()
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "0wR5jVB-WPk_000417_000427.mp4").write_bytes(video(tmp_path, 1))
    (tmp_path / "v" / "74225.webm").write_bytes(video(tmp_path, 2))
    k400 = prepare(
        KineticsSource(str(REAL / "activitynet_kinetics/data/kinetics-400_val.csv"), str(tmp_path / "v")),
        tmp_path / "k400",
        COPY,
    )
    assert (k400.read, len(k400.samples), k400.counts["reasons"]) == (19_906, 1, {"missing_video": 19_905})
    assert k400.classes == (REAL / "label_map_k400.txt").read_text().split("\n")[:400]
    ssv2 = prepare(
        Ssv2Source(
            str(REAL / "ssv2/something-something-v2-validation.json"),
            str(REAL / "ssv2/something-something-v2-labels.json"),
            str(tmp_path / "v"),
            "",
        ),
        tmp_path / "ssv2",
        COPY,
    )
    assert (ssv2.read, len(ssv2.samples), len(ssv2.classes)) == (24_777, 1, 174)
    print(f"both in {time.monotonic() - started:.1f} s")
