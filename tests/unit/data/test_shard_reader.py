"""Reading ahead keeps the order and its bound; a copy that went bad is read from the storage again."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.support.shards import with_damaged_storage
from tests.support.waiting import wait_until
from vswin_dist import storage
from vswin_dist.data import shard_reader
from vswin_dist.data.shard_reader import Members, read_ahead
from vswin_dist.errors import DataError
from vswin_dist.manifest import read_manifest


def test_batches_come_in_order_while_later_ones_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "AHEAD_BYTES", 60)
    begun: set[int] = set()
    lock, read_ahead_of_the_sixth = threading.Lock(), threading.Event()

    def read(item: int) -> bytes:
        with lock:
            begun.add(item)
        if item >= 3 * 6:
            read_ahead_of_the_sixth.set()
        time.sleep(0.001 * (item % 3))
        return bytes([item])

    batches = [list(range(i, i + 3)) for i in range(0, 60, 3)]
    ahead = read_ahead(iter(batches), read, lambda _: 10)
    for number, batch in enumerate(ahead):
        assert [item for item, _ in batch] == batches[number]
        assert [data.result() for _, data in batch] == [bytes([i]) for i in batches[number]]
        assert max(begun) < 3 * (number + 2), "read beyond the bound"
        if number == 5:
            break
    assert read_ahead_of_the_sixth.wait(60), "nothing was read ahead"
    ahead.close()


def test_an_error_belongs_to_its_item() -> None:
    def read(item: int) -> bytes:
        if item == 1:
            raise DataError("gone")
        return b"x"

    ahead = read_ahead(iter([[0, 1]]), read, lambda _: 1)
    (_, good), (_, bad) = next(ahead)
    assert good.result() == b"x"
    with pytest.raises(DataError, match="gone"):
        bad.result()


def test_members_from_copies_are_checked_and_replaced(
    motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSWIN_CACHE", str(tmp_path / "cache"))
    manifest = read_manifest(str(motion_shards / "train"))
    plain, cached = (Members(manifest, str(motion_shards / "train"), gb) for gb in (0.0, 1.0))
    shard = manifest.shards[manifest.samples[3].shard]
    assert cached.cache and cached.read(3) == plain.read(3)
    cache = cached.cache
    wait_until(lambda: cache.read(shard, 0, 1))  # the copy is made in the background
    assert cached.read(3) == plain.read(3)
    with_damaged_storage(motion_shards / "train", tmp_path / "bad", 3)
    copy = next((tmp_path / "cache").glob("*/*.tar"))
    shutil.copy(tmp_path / "bad" / shard.url, copy)
    assert cached.read(3) == plain.read(3), "a bad copy was believed"
    cached.close()
    assert all(p.read_bytes() == (motion_shards / "train" / shard.url).read_bytes() for p in copy.parent.glob("*.tar"))


def test_a_mismatch_is_tried_again(motion_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer that brings wrong bytes twice, then the right ones."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    manifest = with_damaged_storage(motion_shards / "train", tmp_path / "train", 3)
    good = motion_shards / "train" / manifest.shards[manifest.samples[3].shard].url
    waits: list[float] = []

    def heal(wait: float) -> None:
        waits.append(wait)
        if len(waits) == 2:
            shutil.copy(good, tmp_path / "train" / good.name)

    monkeypatch.setattr(storage.time, "sleep", heal)
    assert len(Members(manifest, str(tmp_path / "train")).read(3)) == manifest.samples[3].size
    assert len(waits) == 2
