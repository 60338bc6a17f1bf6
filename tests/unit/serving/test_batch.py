"""Predictions for many videos: where they are found, the rows, and going on after an end in the middle."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.manifest import Manifest, Sample, Shard, write_manifest
from vswin_dist.serving.batch import FORMAT, Identity, Known, Row, Store, Video, find_videos, parts, predict_part
from vswin_dist.serving.predict import load_predictor


@pytest.fixture
def videos(video: str, tmp_path: Path) -> Path:
    """A folder with three good videos, one that is none, and a file of another kind."""
    place = tmp_path / "videos"
    (place / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.MP4", "more/c.webm"):
        shutil.copy(video, place / name)
    (place / "more" / "bad.mp4").write_bytes(b"no video")
    (place / "more" / "labels.csv").write_text("a,b\n")
    return place


@pytest.fixture
def shards(video: str, tmp_path: Path) -> str:
    """One shard with the video, and with one whose bytes are not those of the manifest."""
    return make_shards(video, tmp_path / "shards")


def make_shards(video: str, place: Path) -> str:
    content = Path(video).read_bytes()
    place.mkdir()
    with tarfile.open(place / "0.tar", "w") as tar:
        for key in ("x", "y"):
            entry = tarfile.TarInfo(f"{key}.mp4")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with tarfile.open(place / "0.tar") as tar:
        offsets = [member.offset_data for member in tar]
    good = zlib.crc32(content)
    facts = ("mp4", 12, 12.0, 1.0, 64, 48, "")
    samples = [Sample(k, 0, 0, o, len(content), c, *facts) for k, o, c in zip("xy", offsets, (good, 1), strict=True)]
    shard = Shard("0.tar", (place / "0.tar").stat().st_size, "", 2)
    write_manifest(Manifest("set", "val", ["left"], {}, [shard], samples, [], 2), str(place))
    return str(place)


def test_videos_are_found_in_folders_lists_shards_and_by_name_each_once(videos: Path, shards: str, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"{videos}/a.mp4\n\n  nowhere.mp4\n")
    found, notes = find_videos([str(videos), str(listed), shards, f"{videos}/b.MP4"])
    inside = [f"{videos}/{name}" for name in ("a.mp4", "b.MP4", "more/bad.mp4", "more/c.webm")]
    assert [v.key for v in found] == [*inside, "nowhere.mp4", "x", "y"]
    assert found[5].url == f"{shards}/0.tar" and found[5].size > 0
    assert notes[0].startswith(f"left out 1 files of {videos}") and notes[1].startswith("left out 2 videos")
    url = f"memory://bucket/{tmp_path.name}"
    storage.put_bytes(f"{url}/deep/d.mkv", b"x")
    assert find_videos([url])[0] == [Video(f"{url}/deep/d.mkv", f"{url}/deep/d.mkv")]
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "absent.mp4"):
        with pytest.raises(DataError, match=f"no video at .*{nothing}"):
            find_videos([str(tmp_path / nothing)])


def test_lists_are_texts_in_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    with pytest.raises(DataError, match=r"no video at .*list\.txt"):
        find_videos([str(listed)])
    listed.write_text("/a/é.mp4\nb.mp4\n", encoding="utf-8-sig")
    assert [v.key for v in find_videos([str(listed)])[0]] == ["/a/é.mp4", "b.mp4"]
    listed.write_bytes("/a/é.mp4\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"list\.txt is no list of videos, which is a text in UTF-8"):
        find_videos([str(listed)])


def test_a_key_that_names_two_videos_is_refused(video: str, shards: str, tmp_path: Path) -> None:
    """Two sets of shards with equal keys, asked for at once, and the second one after the first."""
    other, identity = make_shards(video, tmp_path / "other"), Identity("w", "c", 1, 1, 1, False)
    why = rf"the key 'x', one in {shards}/0\.tar and one in {other}/0\.tar: give each set of videos an --out of its own"
    with pytest.raises(DataError, match=why):
        find_videos([shards, other])
    store, asked = Store(str(tmp_path / "out"), identity), find_videos([shards, shards])[0]
    store.add([Row(v.key, v.url, error="bad") for v in asked[:1]])
    assert store.done() == {"x": Known(f"{shards}/0.tar", "bad")}
    assert parts(asked, store.done(), 4) == [asked[1:]]
    with pytest.raises(DataError, match=why):
        parts(find_videos([other])[0], store.done(), 4)


def test_an_output_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """It has no column of URLs."""
    identity = Identity("w", "c", 1, 1, 1, False)
    store = Store(str(tmp_path), identity)
    table = pa.table({"key": ["a"], "error": ["bad"]})
    earlier = json.dumps(asdict(replace(identity, version=1))).encode()
    pq.write_table(table.replace_schema_metadata({FORMAT: earlier}), tmp_path / "part-a.parquet")
    with pytest.raises(DataError, match="other version: name another --out, or give --fresh"):
        store.done()


@pytest.mark.slow
def test_a_row_for_each_video_and_the_rest_after_an_end_in_the_middle(
    videos: Path, shards: str, folder: str, tmp_path: Path
) -> None:
    predictor, identity = load_predictor(folder, clips=2), Identity.of(folder, 2, 1, 2, True)
    store, asked = Store(str(tmp_path / "out"), identity), find_videos([str(videos), shards])[0]
    first, *others = parts(asked, store.done(), 2)
    assert [len(part) for part in (first, *others)] == [2, 2, 2]
    store.add(predict_part(predictor, first, identity, threads=2, group=3))
    for part in parts(asked, store.done(), 4):  # the job was killed; with another size of parts
        store.add(predict_part(predictor, part, identity, threads=2, group=3))
    store.add(
        predict_part(predictor, first, identity, threads=1, group=1)
    )  # as a process does that was cut off and came back
    assert parts(asked, store.done(), 4) == []

    table = pandas.read_parquet(store.url).set_index("key").loc[[v.key for v in asked]]
    assert len(table) == len(asked) == 6
    assert list(table["url"]) == [v.url for v in asked]
    bad = table[table["error"].notna()]
    assert [key.rsplit("/", 1)[-1] for key in bad.index] == ["bad.mp4", "y"]
    assert "cannot be decoded" in bad["error"].iloc[0] and "are damaged (crc32" in bad["error"].iloc[1]
    assert bad[["classes", "scores", "features"]].isna().all(axis=None)
    scores, features = predictor.scores_and_features([predictor.views(f"{videos}/a.mp4")])
    for _, row in table[table["error"].isna()].iterrows():
        best = predictor.best(scores[0], 2)
        assert list(row["classes"]) == [n for n, _ in best]
        assert list(row["scores"]) == pytest.approx([p for _, p in best], abs=1e-5)
        torch.testing.assert_close(torch.tensor(row["features"]), features[0], atol=1e-4, rtol=1e-4)

    other = Store(store.url, replace(identity, top=3, features=False))
    with pytest.raises(DataError, match="other top, features: name another --out, or give --fresh"):
        other.done()
    other.clear()
    assert other.done() == {}
    (tmp_path / "out" / "part-x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-x\.parquet holds no predictions"):
        store.done()


@pytest.mark.slow
def test_no_row_is_written_where_storage_fails(folder: str, video: str, tmp_path: Path) -> None:
    from vswin_dist.errors import StorageError

    predictor, identity = load_predictor(folder), Identity.of(folder, 1, 1, 5, False)
    away = Video("a", "s3://bucket/a.mp4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "ATTEMPTS", 1)
        for name, value in {
            "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
        }.items():
            patch.setenv(name, value)
        with pytest.raises(StorageError, match="s3://bucket/a"):
            predict_part(predictor, [Video("b", video), away], identity, threads=1, group=1)
