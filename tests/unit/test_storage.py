"""Atomic puts, length checks, retries, and which error says what."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

import pytest

from vswin_dist import local_files, storage
from vswin_dist.errors import DataError, StorageError


def test_a_put_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = storage.join(str(tmp_path), "a", "b.bin")
    storage.put_bytes(url, b"first")
    monkeypatch.setattr(local_files.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("full")))
    with pytest.raises(StorageError, match="no access"):
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

    def away() -> None:
        calls.append(1)
        raise TimeoutError("no answer")

    with pytest.raises(StorageError, match=r"^x: TimeoutError: no answer \(after 5 attempts\)$") as error:
        storage.with_retry(lambda: storage.with_retry(away, "x"), "outer")
    assert len(calls) == 5 and error.value.retriable and error.value.exit_code == 1
    calls.clear()

    def absent() -> None:
        calls.append(1)
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError, match="x does not exist"):
        storage.with_retry(absent, "x")
    assert len(calls) == 1


def test_a_store_that_is_away_is_asked_once_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answers: list[Exception | None] = []

    def ask() -> None:
        if answer := answers.pop(0):
            raise answer

    def calls(url: str, *found: Exception | None) -> int:
        answers[:] = [*found, *[TimeoutError()] * 9]
        with contextlib.suppress(StorageError, FileNotFoundError):
            storage.with_retry(ask, url)
        return len(found) + 9 - len(answers)

    assert [calls("s3://gone/a"), calls("s3://gone/b"), calls("s3://other/b"), calls("/local/x"), calls("/local/x")] == [
        5,
        1,
        5,
        5,
        5,
    ]
    assert [calls("s3://gone/a", None), calls("s3://gone/a")] == [1, 5]
    assert [calls("s3://gone/a", FileNotFoundError()), calls("s3://gone/a", OSError("reset"), None)] == [1, 2]
    assert calls("s3://gone/a") == 5
    monkeypatch.setattr(storage, "AWAY_S", 0.0)
    assert calls("s3://gone/a") == 5, "after a wait"
    assert [calls("s3://other/a", None), calls("s3://gone/a", None)] == [1, 1]  # both answer again


def test_names_paths_and_unknown_schemes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").touch()
    assert storage.list_names(str(tmp_path)) == ["a.txt", "b"]
    assert storage.list_names(str(tmp_path / "none")) == []
    assert storage.join("s3://x/y/", "z") == "s3://x/y/z" and storage.join("/a", "s3://b") == "s3://b"
    assert storage.absolute("file:///tmp/x") == "/tmp/x"
    with pytest.raises(DataError, match="cannot open 'nope://x'"):
        storage.filesystem("nope://x")
    with pytest.raises(StorageError, match="cannot write to /proc/no"):
        storage.check_writable("/proc/no")


def test_the_data_root_is_the_variables_or_below_a_home_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSWIN_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_files.home() == tmp_path / "vswin" and storage.absolute("~/x") == f"{tmp_path}/x"
    monkeypatch.setattr(local_files.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    assert local_files.home() == tmp_path / "tmp" / f"vswin-{os.getuid()}" / "vswin"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a container's user id without a name
    monkeypatch.chdir(tmp_path)
    assert local_files.home() == tmp_path / "tmp" / f"vswin-{os.getuid()}" / "vswin"
    assert storage.absolute("~/x") == f"{tmp_path}/~/x"
    monkeypatch.setenv("VSWIN_HOME", "data")
    assert local_files.home() == tmp_path / "data"


class NoCredentialsError(Exception):
    """As botocore calls it."""


@pytest.mark.parametrize(
    ("met", "words"),
    [
        (PermissionError(errno.EACCES, "Access Denied"), r"^no access to s3://b/x: .*Access Denied\. Check the credentials"),
        (NoCredentialsError(), "^no credentials for s3://b/x: set AWS_ACCESS_KEY_ID"),
    ],
)
def test_what_no_attempt_mends_is_known_at_once(met: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda _: pytest.fail("retried"))

    def fail() -> None:
        raise met

    with pytest.raises(StorageError, match=words) as error:
        storage.with_retry(fail, "s3://b/x")
    assert not error.value.retriable and error.value.errno == getattr(met, "errno", None)
    assert not storage.retriable(met) and not storage.retriable(error.value)


def test_a_full_disk_is_tried_for_seconds_and_not_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail() -> None:
        raise full

    with pytest.raises(StorageError, match=r"^/x: OSError: .*No space left on device \(after 5 attempts\)$") as error:
        storage.with_retry(fail, "/x")
    assert len(waits) == 4 and error.value.errno == errno.ENOSPC
    assert not storage.retriable(full) and not error.value.retriable


def test_what_may_be_tried_later() -> None:
    assert storage.retriable(StorageError("away")) and storage.retriable(TimeoutError())
    assert not storage.retriable(StorageError("refused", retriable=False))
    assert not storage.retriable(DataError("damaged")) and not storage.retriable(FileNotFoundError())
    assert not storage.retriable(KeyboardInterrupt())


def test_damage_is_of_the_data_and_not_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    (tmp_path / "f").write_bytes(b"0123456789")
    with pytest.raises(DataError, match=r"f: the 3 bytes at offset 2 are damaged \(crc32 .* \(after 5 attempts\)$"):
        storage.read_range(str(tmp_path / "f"), 2, 3, crc32=1)


def test_a_file_is_written_whole_or_stays(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    with local_files.write_atomically(target) as temporary:
        temporary.write_text("first")
        assert temporary.parent == target.parent and not target.exists()
    with pytest.raises(KeyError), local_files.write_atomically(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "first" and list(target.parent.iterdir()) == [target]
