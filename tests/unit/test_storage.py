"""Atomic puts, length checks and retries."""

from __future__ import annotations

from pathlib import Path

import pytest

from vswin_dist import storage
from vswin_dist.errors import DataError


def test_a_put_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = storage.join(str(tmp_path), "a", "b.bin")
    storage.put_bytes(url, b"first")
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("full")))
    with pytest.raises(DataError, match="no access"):
        storage.put_bytes(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.bin"], "a part was left"


def test_a_range_past_the_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    (tmp_path / "f").write_bytes(b"0123456789")
    assert storage.read_range(str(tmp_path / "f"), 3, 4) == b"3456"
    with pytest.raises(DataError, match="got 2 of 5 bytes at offset 8"):
        storage.read_range(str(tmp_path / "f"), 8, 5)


def test_passing_errors_are_tried_again_and_final_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("reset")
        return "done"

    assert storage.with_retry(flaky, "x") == "done" and len(calls) == 3
    calls.clear()

    def absent() -> None:
        calls.append(1)
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError, match="x does not exist"):
        storage.with_retry(absent, "x")
    assert len(calls) == 1


def test_names_paths_and_unknown_schemes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").touch()
    assert storage.list_names(str(tmp_path)) == ["a.txt", "b"]
    assert storage.list_names(str(tmp_path / "none")) == []
    assert storage.join("s3://x/y/", "z") == "s3://x/y/z" and storage.join("/a", "s3://b") == "s3://b"
    assert storage.absolute("file:///tmp/x") == "/tmp/x"
    with pytest.raises(DataError, match="cannot open 'nope://x'"):
        storage.filesystem("nope://x")
    with pytest.raises(DataError, match="cannot write to /proc/no"):
        storage.check_writable("/proc/no")
