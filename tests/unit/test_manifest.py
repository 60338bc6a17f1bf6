"""The manifest: the same content has the same fingerprint and bytes, and contradictions are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
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

# `manifest()`, as the version before the samples had a file of their own wrote it
EARLIER: dict[str, Any] = json.loads((Path(__file__).parent / "earlier_manifest.json").read_text())


def sample(number: int, shard: int = 0) -> Sample:
    return Sample(
        f"k{number}", number % 2, shard, 512 * number, 100, number, "mp4", 30, 30.0, 1.0, 64, 48, f"v/{number}.mp4"
    )


def manifest(**changes: object) -> Manifest:
    shards = [Shard("s-0.tar", 5000, "ab", 2), Shard("s-1.tar", 9, "cd", 1)]
    whole = Manifest(
        "set",
        "train",
        ["a", "b"],
        {"profile": "train"},
        shards,
        [sample(0), sample(1), sample(2, 1)],
        [Reject("v/9.mp4", "a", "truncated", "at frame 3")],
        4,
    )
    return dataclasses.replace(whole, **changes)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    url = write_manifest(manifest(), str(tmp_path))
    assert read_manifest(str(tmp_path)) == read_manifest(url) == manifest()
    assert list(read_manifest(url).samples) == [sample(0), sample(1), sample(2, 1)]
    assert manifest().counts == {"read": 4, "kept": 3, "rejected": 1, "reasons": {"truncated": 1}}
    assert shard_url(str(tmp_path), manifest().shards[1]) == f"{tmp_path}/s-1.tar"


def test_the_fingerprint_is_of_the_content_alone() -> None:
    base = manifest().fingerprint
    assert base == EARLIER["fingerprint"]
    assert manifest(name="other", split="x").fingerprint == base
    moved = [dataclasses.replace(s, url=f"s3://bucket/{s.url}") for s in manifest().shards]
    assert manifest(shards=moved).fingerprint == base
    changed = [
        manifest(classes=["a", "c"]),
        manifest(encoding={"profile": "copy"}),
        manifest(shards=[dataclasses.replace(manifest().shards[0], sha256="ff"), manifest().shards[1]]),
        manifest(samples=[dataclasses.replace(sample(0), class_id=1), sample(1), sample(2, 1)]),
    ]
    assert len({m.fingerprint for m in changed} | {base}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read": 5}, "read 5 is not kept 3 + rejected 1"),
        ({"sampling": "sparse"}, "sampling 'sparse' is none of dense, uniform"),
        ({"samples": [sample(0), sample(0), sample(2, 1)]}, "1 keys stand twice, for instance 'k0'"),
        ({"samples": [dataclasses.replace(sample(0), key="a.b"), sample(1), sample(2, 1)]}, "key 'a.b' has a dot"),
        ({"samples": [sample(0), sample(1), sample(2)]}, "shard s-0.tar says 2 samples, 3 are listed"),
        (
            {"samples": [dataclasses.replace(sample(0), class_id=7), sample(1), sample(2, 1)]},
            "class id 7, there are 2 classes",
        ),
        (
            {"samples": [dataclasses.replace(sample(0), frames=0), sample(1), sample(2, 1)]},
            "1 without content: 'v/0.mp4' with 0 frames, 100 bytes. Remove the dataset",
        ),
        (
            {"samples": [sample(0), sample(1), dataclasses.replace(sample(2, 1), size=0)]},
            "1 without content: 'v/2.mp4' with 30 frames, 0 bytes. Remove the dataset",
        ),
        (
            {"shards": [Shard("s-0.tar", 5000, "ab", 2), Shard("s-1.tar", 0, "cd", 1)]},
            "1 without content: shard s-1.tar with 0 bytes. Remove the dataset",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        write_manifest(manifest(**changes), str(tmp_path))
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_sampling_is_kept_beside_the_content(tmp_path: Path) -> None:
    uniform = manifest(sampling="uniform")
    assert read_manifest(write_manifest(uniform, str(tmp_path))).sampling == "uniform"
    assert uniform.fingerprint == manifest().fingerprint
    body = {key: value for key, value in EARLIER.items() if key != "sampling"}  # as written before there was one
    (tmp_path / "old.json").write_text(json.dumps(body))
    assert read_manifest(str(tmp_path / "old.json")).sampling == "dense"


def test_a_manifest_that_holds_everything_in_its_json_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(EARLIER))
    found = read_manifest(str(tmp_path))
    assert found == manifest(colours=1) and found.fingerprint == EARLIER["fingerprint"]
    write_manifest(found, str(tmp_path))
    assert json.loads((tmp_path / "manifest.json").read_text())["version"] == 2
    assert read_manifest(str(tmp_path)) == found
    for change, message in (
        ({"size": [100, 100]}, "its columns differ in length"),
        ({"size": [100, 100, "x"]}, "column size: "),
        ({"class_id": [0, 1, 1]}, "was changed by hand"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(EARLIER | {"samples": EARLIER["samples"] | change}))
        with pytest.raises(DataError, match=message):
            read_manifest(str(tmp_path / "bad.json"))


def column_file(folder: Path, name: str = "samples") -> Path:
    [found] = folder.glob(f"manifest.{name}.*.parquet")
    return found


def test_stock_tools_read_the_columns(tmp_path: Path) -> None:
    write_manifest(manifest(), str(tmp_path))
    assert pandas.read_parquet(column_file(tmp_path)).to_dict("list") == EARLIER["samples"]
    assert pandas.read_parquet(column_file(tmp_path, "rejected")).to_dict("records") == EARLIER["rejected"]


@pytest.fixture
def fresh_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a node that has read nothing yet."""
    monkeypatch.setenv("VSWIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "no parquet"])
def test_a_damaged_column_file_is_named(damage: str, tmp_path: Path, fresh_node: Path) -> None:
    write_manifest(manifest(), str(tmp_path))
    path = column_file(tmp_path)
    data = path.read_bytes()
    head = (tmp_path / "manifest.json").read_text()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"cut": data[:-9], "changed": data[:99] + b"?" + data[100:], "no parquet": b"x" * len(data)}[damage]
        )
    if damage == "no parquet":
        digests = [hashlib.sha256(d).hexdigest() for d in (data, path.read_bytes())]
        (tmp_path / "manifest.json").write_text(head.replace(*digests))
    messages = {"cut": f"has {len(data) - 9} bytes", "gone": "does not exist", "no parquet": "is not a valid column file"}
    with pytest.raises(DataError) as error:
        read_manifest(str(tmp_path))
    assert str(path) in str(error.value) and messages.get(damage, "cut short, damaged or replaced") in str(error.value)
    assert not list(fresh_node.rglob("*.safetensors"))


def test_the_head_is_written_last_and_what_it_replaces_goes_after_it(
    tmp_path: Path, fresh_node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(manifest(), str(tmp_path))
    first = column_file(tmp_path)
    more = manifest(samples=[dataclasses.replace(sample(0), crc32=7), sample(1), sample(2, 1)])
    with monkeypatch.context() as patch:
        patch.setattr("vswin_dist.storage.put_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_manifest(more, str(tmp_path))
    assert read_manifest(str(tmp_path)) == manifest(), "a writer that is stopped leaves what was there"
    write_manifest(more, str(tmp_path))
    assert read_manifest(str(tmp_path)) == more
    assert column_file(tmp_path) != first, "the replaced file is gone"


@pytest.mark.slow
def test_another_process_gets_a_reference_and_maps_the_copy_of_the_node(tmp_path: Path, fresh_node: Path) -> None:
    many = [dataclasses.replace(sample(n), class_id=n % 2, shard=n // 50_000) for n in range(100_000)]
    shards = [Shard("s-0.tar", 5, "ab", 50_000), Shard("s-1.tar", 9, "cd", 50_000)]
    write_manifest(manifest(samples=many, shards=shards, read=100_001), str(tmp_path))
    found = read_manifest(str(tmp_path))
    part = dataclasses.replace(found, samples=found.samples[np.array([70_000, 3])])
    pickled = pickle.dumps((found, part))
    assert len(pickled) < 3000
    [copy] = fresh_node.rglob("*.safetensors")
    code = f"""
import pickle, sys
whole, part = pickle.loads({pickled!r})
assert "pyarrow" not in sys.modules, "each process would hold its libraries"
assert any({str(copy)!r} in line for line in open("/proc/self/maps"))
print(whole.fingerprint, len(whole.samples), whole.samples[-1].key, [s.key for s in part.samples])
"""
    (tmp_path / "manifest.json").rename(tmp_path / "away.json")  # the node has all that it takes
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{found.fingerprint} 100000 k99999 ['k70000', 'k3']\n", done.stderr
    (tmp_path / "away.json").rename(tmp_path / "manifest.json")
    copy.write_bytes(copy.read_bytes()[:-1])  # as a disk that was full may leave it
    assert pickle.loads(pickled)[1].samples[1] == many[3], "what is not whole is made again"


def test_without_a_folder_for_the_copy_every_process_holds_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(manifest(), str(tmp_path))
    (tmp_path / "file").touch()
    monkeypatch.setenv("VSWIN_CACHE", str(tmp_path / "file"))
    assert read_manifest(str(tmp_path)) == manifest()
    assert "Point VSWIN_CACHE to a folder" in capsys.readouterr().out


def test_the_version_of_the_colours_is_kept_beside_the_content(tmp_path: Path) -> None:
    assert read_manifest(write_manifest(manifest(), str(tmp_path))).colours == 2
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(EARLIER))  # as written before there was one
    assert read_manifest(str(old)).colours == 1 and read_manifest(str(old)).fingerprint == manifest().fingerprint
    new.write_text(json.dumps(EARLIER | {"colours": 3}))
    with pytest.raises(DataError, match=r"new\.json: colours 3 are not known here, 1 to 2 are: install a newer version"):
        read_manifest(str(new))


def test_a_file_that_was_changed_or_is_none_is_refused(tmp_path: Path) -> None:
    path = Path(write_manifest(manifest(), str(tmp_path)))
    body = json.loads(path.read_text())
    body["classes"] = ["b", "a"]
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match="was changed by hand"):
        read_manifest(str(path))
    path.write_text("{}")
    with pytest.raises(DataError, match=r"is not a valid manifest: format None, version None; expected 'vswin-manifest', 2"):
        read_manifest(str(path))
    path.write_text("{")
    with pytest.raises(DataError, match="is not a valid manifest: it is not JSON"):
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
