"""The manifest: the same content has the same fingerprint and bytes, and contradictions are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vswin_dist.errors import DataError
from vswin_dist.manifest import (
    Manifest,
    Reject,
    Sample,
    Shard,
    check_same_classes,
    check_shard_sizes,
    read_manifest,
    shard_url,
    write_manifest,
)


def sample(number: int, shard: int = 0) -> Sample:
    return Sample(f"k{number}", number % 2, shard, 512 * number, 100, number, "mp4", 30, 30.0, 1.0, 64, 48,
                  f"v/{number}.mp4")


def manifest(**changes: object) -> Manifest:
    shards = [Shard("s-0.tar", 5000, "ab", 2), Shard("s-1.tar", 9, "cd", 1)]
    whole = Manifest("set", "train", ["a", "b"], {"profile": "train"}, shards,
                     [sample(0), sample(1), sample(2, 1)], [Reject("v/9.mp4", "a", "truncated", "at frame 3")], 4)
    return dataclasses.replace(whole, **changes)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    url = write_manifest(manifest(), str(tmp_path))
    assert read_manifest(str(tmp_path)) == read_manifest(url) == manifest()
    assert manifest().counts == {"read": 4, "kept": 3, "rejected": 1, "reasons": {"truncated": 1}}
    assert shard_url(str(tmp_path), manifest().shards[1]) == f"{tmp_path}/s-1.tar"


def test_the_fingerprint_is_of_the_content_alone() -> None:
    base = manifest().fingerprint
    assert manifest(name="other", split="x").fingerprint == base
    moved = [dataclasses.replace(s, url=f"s3://bucket/{s.url}") for s in manifest().shards]
    assert manifest(shards=moved).fingerprint == base
    changed = [
        manifest(classes=["a", "c"]), manifest(encoding={"profile": "copy"}),
        manifest(shards=[dataclasses.replace(manifest().shards[0], sha256="ff"), manifest().shards[1]]),
        manifest(samples=[dataclasses.replace(sample(0), class_id=1), sample(1), sample(2, 1)]),
    ]
    assert len({m.fingerprint for m in changed} | {base}) == 5


@pytest.mark.parametrize(("changes", "message"), [
    ({"read": 5}, "read 5 is not kept 3 + rejected 1"),
    ({"sampling": "sparse"}, "sampling 'sparse' is none of dense, uniform"),
    ({"samples": [sample(0), sample(0), sample(2, 1)]}, "1 keys stand twice, for instance 'k0'"),
    ({"samples": [dataclasses.replace(sample(0), key="a.b"), sample(1), sample(2, 1)]}, "key 'a.b' has a dot"),
    ({"samples": [sample(0), sample(1), sample(2)]}, "shard s-0.tar says 2 samples, 3 are listed"),
    ({"samples": [dataclasses.replace(sample(0), class_id=7), sample(1), sample(2, 1)]}, "class id 7, there are 2 classes"),
])
def test_contradictions_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        write_manifest(manifest(**changes), str(tmp_path))
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_sampling_is_kept_beside_the_content(tmp_path: Path) -> None:
    uniform = manifest(sampling="uniform")
    assert read_manifest(write_manifest(uniform, str(tmp_path))).sampling == "uniform"
    assert uniform.fingerprint == manifest().fingerprint
    body = json.loads(manifest().to_json())
    del body["sampling"]  # as written before there was one
    assert Manifest.from_json(json.dumps(body).encode(), "old").sampling == "dense"


def test_a_file_that_was_changed_or_is_none_is_refused(tmp_path: Path) -> None:
    path = Path(write_manifest(manifest(), str(tmp_path)))
    body = json.loads(path.read_text())
    body["classes"] = ["b", "a"]
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match="was changed by hand"):
        read_manifest(str(path))
    path.write_text("{}")
    with pytest.raises(DataError, match="no manifest that this version reads"):
        read_manifest(str(path))
    path.write_text("{")
    with pytest.raises(DataError, match="not a readable manifest"):
        read_manifest(str(path))
    with pytest.raises(DataError, match="Make them with data-prep shard"):
        read_manifest(str(tmp_path / "nowhere"))


def test_classes_and_shard_sizes_are_compared(tmp_path: Path) -> None:
    check_same_classes(["a", "b"], ["a", "b"], "it")
    with pytest.raises(DataError, match="2 classes against 1"):
        check_same_classes(["a", "b"], ["a"], "it")
    (tmp_path / "s-0.tar").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match=r"s-1\.tar is absent; the manifest expects 9 bytes"):
        check_shard_sizes(manifest(), str(tmp_path))
    (tmp_path / "s-1.tar").write_bytes(b"x" * 8)
    with pytest.raises(DataError, match="has 8 bytes, the manifest says 9"):
        check_shard_sizes(manifest(), str(tmp_path))
