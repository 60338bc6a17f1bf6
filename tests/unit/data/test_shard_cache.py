"""Copies of shards on a node's disk: whole or absent, within the bound, also when many processes want them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from vswin_dist import local_files, storage
from vswin_dist.data.shard_cache import LOCK, NoRoom, ShardCache, open_cache
from vswin_dist.errors import DataError
from vswin_dist.manifest import Shard

SIZE = 100_000


def shards(folder: Path, count: int, first: int = 0) -> list[tuple[Shard, str]]:
    found = []
    for number in range(first, first + count):
        content = bytes([number]) * SIZE
        path = folder / f"{number}.tar"
        path.write_bytes(content)
        found.append((Shard(path.name, SIZE, hashlib.sha256(content).hexdigest(), 1), str(path)))
    return found


def held(folder: Path) -> list[int]:
    return [p.stat().st_size for p in folder.glob("*/*.tar")]


def test_a_copy_is_made_in_the_background_and_read_by_offset(tmp_path: Path) -> None:
    [(shard, url)] = shards(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", 10 * SIZE, "set")
    assert cache.read(shard, 5, 10) is None
    cache.want(shard, url)
    wait_until(lambda: cache.read(shard, 5, 10) is not None)
    assert cache.read(shard, 5, 10) == bytes(10)
    cache.close()
    assert held(tmp_path / "cache") == [SIZE] and not list(tmp_path.rglob("*.part"))


def test_what_is_not_the_shard_is_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    (shard, url), (other, other_url) = shards(tmp_path, 2)
    cache = ShardCache(tmp_path / "cache", 10 * SIZE, "set")
    with pytest.raises(DataError, match="its sha256 is"):
        cache.fill(shard, other_url)
    Path(url).write_bytes(Path(url).read_bytes()[:-1])
    with pytest.raises(DataError, match="the file is cut short"):
        cache.fill(shard, url)
    assert not held(tmp_path / "cache") and not list(tmp_path.rglob("*.part"))
    assert cache.fill(other, other_url) and cache.read(other, 0, 1) == b"\x01"
    cache.close()


def test_the_bound_holds_and_a_set_in_use_stays(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first, second = ShardCache(folder, 3 * SIZE, "first"), ShardCache(folder, 3 * SIZE, "second")
    for shard, url in shards(tmp_path, 2):
        assert first.fill(shard, url)
    (third, url), (fourth, fourth_url) = shards(tmp_path, 2, first=2)
    assert second.fill(third, url)
    with pytest.raises(DataError, match=r"data\.cache_gb=0\.0003 has no room for its 100000 bytes"):
        second.fill(fourth, fourth_url)
    assert len(held(folder)) == 3
    first.close()
    assert second.fill(fourth, fourth_url)
    assert len(held(folder)) == 3 and len(list((folder / "second").glob("*.tar"))) == 2
    second.close()


def test_no_room_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = shards(tmp_path, 4)
    cache = ShardCache(tmp_path / "cache", SIZE, "set")
    for shard, url in wanted:
        cache.want(shard, url)
    wait_until(cache._wanted.empty)  # the last one was taken, so the others are done
    cache.close()
    assert held(tmp_path / "cache") == [SIZE]
    assert capfd.readouterr().out.splitlines() == [
        "shards are kept on this node as far as there is room: data.cache_gb=0.0001 has no room for its 100000 bytes"
    ]


def test_a_full_disk_is_known_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def full(file: int, offset: int, length: int) -> None:
        asked.append(length)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    [(shard, url)] = shards(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", 10 * SIZE, "set")
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(storage, "read_range", lambda *_: pytest.fail("fetched"))
    with pytest.raises(NoRoom, match=r"the disk of .*/cache has no room for its 100000 bytes"):
        cache.fill(shard, url)
    cache.close()
    assert asked == [SIZE], "tried again"
    assert not list(tmp_path.rglob("*.part"))


def test_a_part_has_its_blocks_from_the_start(tmp_path: Path) -> None:
    [(shard, _)] = shards(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", 10 * SIZE, "set")
    with cache._part(shard) as part:
        assert part and os.fstat(part.fileno()).st_blocks * 512 >= SIZE
    cache.close()


def test_without_a_usable_folder_there_is_no_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert open_cache(tmp_path / "file" / "cache", SIZE, "set") is None
    [line] = capfd.readouterr().out.splitlines()
    assert "samples are read by offset" in line and str(tmp_path / "file") in line and "VSWIN_CACHE" in line


def test_each_user_has_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSWIN_CACHE", raising=False)
    assert local_files.cache_home().name == f"vswin-cache-{os.getuid()}"


def fill_all(folder: str, source: str, wanted: list[tuple[Shard, str]], bound: int) -> None:
    cache = ShardCache(Path(folder), bound, "set")
    for shard, url in wanted:
        for _ in range(3):
            try:
                cache.fill(shard, url)
            except DataError as error:
                assert "no room" in str(error)
            data = cache.read(shard, 0, SIZE)
            assert data is None or hashlib.sha256(data).hexdigest() == shard.sha256
    cache.close()


def test_many_processes_share_it(tmp_path: Path) -> None:
    wanted, folder = shards(tmp_path, 6), tmp_path / "cache"
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    others = [
        context.Process(target=fill_all, args=(str(folder), str(tmp_path), wanted[i:] + wanted[:i], 4 * SIZE))
        for i in range(3)
    ]
    for p in others:
        p.start()
    while any(p.is_alive() for p in others):
        with (folder / LOCK).open("a") as lock:  # without it a listing is not of one moment
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert sum(held(folder)) <= 4 * SIZE
        time.sleep(0.005)
    assert [p.exitcode for p in others] == [0, 0, 0]
    assert held(folder) == [SIZE] * 4 and not list(folder.rglob("*.part"))


def test_no_copy_gets_its_name_while_another_process_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it is gone under the one name, not yet seen under the other, and one more than the bound has room."""
    [(shard, url)], folder = shards(tmp_path, 1, first=7), tmp_path / "cache"
    cache, read, arrives = ShardCache(folder, SIZE, "set"), storage.read_range, threading.Event()
    monkeypatch.setattr(storage, "read_range", lambda *of: arrives.wait(60) and read(*of))
    cache.want(shard, url)
    part, copy = (folder / "set" / f"{shard.sha256}.{kind}" for kind in ("part", "tar"))
    wait_until(lambda: part.exists() and part.stat().st_size == SIZE)
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arrives.set()
        wait_until(lambda: part.read_bytes()[-1:] == Path(url).read_bytes()[-1:])
        time.sleep(0.2)
        assert part.exists() and not copy.exists()
    wait_until(copy.exists)
    cache.close()


def begin_and_hang(folder: str, shard: Shard) -> None:
    with ShardCache(Path(folder), 2 * SIZE, "set")._part(shard) as part:
        assert part
        part.write(b"half")
        part.flush()
        time.sleep(600)


def test_a_part_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    [(shard, url)], folder = shards(tmp_path, 1), tmp_path / "cache"
    process = multiprocessing.get_context("forkserver").Process(target=begin_and_hang, args=(str(folder), shard))
    process.start()
    part = folder / "set" / f"{shard.sha256}.part"
    wait_until(lambda: part.exists() and part.read_bytes()[:4] == b"half")
    cache = ShardCache(folder, SIZE, "set")
    assert cache.fill(shard, url) is False, "another process is at it"
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert part.stat().st_size == SIZE and cache.read(shard, 0, 1) is None
    assert cache.fill(shard, url) and cache.read(shard, SIZE - 1, 1) == b"\x00"
    cache.close()
