"""Copies of whole shards on a node's own disk, shared by every process of the node, within a bound.

`FOLDER/FINGERPRINT/SHA256.tar` is a whole shard whose sha256 was checked; while it arrives it is a `.part` that
its writer holds locked, and has its final length and disk blocks from the start, so that what is written and what will
be can be added up. A set in use is never evicted: reads come in random order, so that dropping one of its shards for another
would move bytes and gain nothing. What does not fit is read by offset from the storage, as is everything where the
folder is of no use. Locks are flocks, which end with their process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vswin_dist import storage
from vswin_dist.errors import DataError, StorageError
from vswin_dist.manifest import Shard

IN_USE = "in-use"  # held shared by each process that reads the set
LOCK = "lock"  # held while files are added up, and where one comes to be or gets its name
FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoom(DataError):
    """The bound is reached, or the disk is full: no further shard is kept."""


def open_cache(folder: Path, bound: int, fingerprint: str) -> ShardCache | None:
    """Open the cache; None, and a line that says why, where `folder` cannot be used: a copy only saves requests."""
    try:
        return ShardCache(folder, bound, fingerprint)
    except OSError as error:
        print(
            f"no shards are kept on this node, samples are read by offset: {error}. Point VSWIN_CACHE to a folder that "
            "can be written, or give data.cache_gb=0",
            flush=True,
        )
        return None


class ShardCache:
    """The cache as one process sees it. Shards are copied by a thread of their own, one at a time.

    Args:
        bound: bytes that all sets in `folder` may take together.
        fingerprint: of the manifest whose shards are read.

    Raises:
        OSError: `folder` cannot be used.
    """

    def __init__(self, folder: Path, bound: int, fingerprint: str) -> None:
        self.folder, self.bound, self.set = folder, bound, folder / fingerprint
        self.set.mkdir(parents=True, exist_ok=True)
        self._using = open(self.set / IN_USE, "a")  # noqa: SIM115 - held until `close`
        fcntl.flock(self._using, fcntl.LOCK_SH)
        os.utime(self.set / IN_USE)
        self._wanted: queue.SimpleQueue[tuple[Shard, str] | None] = queue.SimpleQueue()
        self._asked: set[str] = set()
        self._stopped = threading.Event()
        self._full = False
        self._thread: threading.Thread | None = None

    def read(self, shard: Shard, offset: int, size: int) -> bytes | None:
        """Read `size` bytes of `shard` from `offset`; None where there is no copy, or none that can be read."""
        try:
            file = os.open(self._path(shard), os.O_RDONLY)
            try:
                return os.pread(file, size, offset)
            finally:
                os.close(file)
        except OSError:
            return None

    def want(self, shard: Shard, url: str) -> None:
        """Have `shard` copied in the background, once; returns at once."""
        if shard.sha256 in self._asked or self._stopped.is_set():
            return
        self._asked.add(shard.sha256)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shard-cache", daemon=True)
            self._thread.start()
        self._wanted.put((shard, url))

    def discard(self, shard: Shard) -> None:
        """Remove the copy of `shard`, which is damaged, so that it is fetched anew."""
        with contextlib.suppress(OSError):
            self._path(shard).unlink()
            self._asked.discard(shard.sha256)

    def close(self) -> None:
        """Stop copying; the set is no longer in use by this process."""
        self._stopped.set()
        self._wanted.put(None)
        if self._thread:
            self._thread.join()
        self._using.close()

    def _path(self, shard: Shard) -> Path:
        return self.set / f"{shard.sha256}.tar"

    def _work(self) -> None:
        while (item := self._wanted.get()) and not self._stopped.is_set():
            shard, url = item
            try:
                if not self.fill(shard, url):
                    self._asked.discard(shard.sha256)
            except NoRoom as error:  # expected where the bound is below the set: reported once
                if not self._full:
                    print(f"shards are kept on this node as far as there is room: {error}", flush=True)
                self._full = True
            except (DataError, StorageError, OSError) as error:  # reading by offset continues, and says what is wrong
                print(f"shard not kept on this node: {url}: {error}", flush=True)

    def fill(self, shard: Shard, url: str) -> bool:
        """Copy `shard` from `url`; False where another process is at it, or `close` was called.

        Raises:
            FileNotFoundError: `url` is absent. DataError: it stays another than the manifest's. StorageError: it cannot be
                read. NoRoom: there is none within the bound, or on the disk; known at once, and not retried.
        """

        def attempt() -> bool:
            try:
                return self._fill(shard, url)
            except OSError as error:
                if error.errno in FULL:
                    raise NoRoom(f"the disk of {self.folder} has no room for its {shard.bytes} bytes") from error
                raise

        return storage.with_retry(attempt, url)

    def _fill(self, shard: Shard, url: str) -> bool:
        with self._part(shard) as part:
            if part is None:
                return self._path(shard).exists()
            digest = hashlib.sha256()
            for offset in range(0, shard.bytes, storage.CHUNK):
                if self._stopped.is_set():
                    return False
                data = storage.read_range(url, offset, min(storage.CHUNK, shard.bytes - offset))
                digest.update(data)
                part.write(data)
            part.flush()
            if digest.hexdigest() != shard.sha256:
                raise storage.Damaged(f"its sha256 is {digest.hexdigest()[:12]}..., expected {shard.sha256[:12]}...")
            os.fsync(part.fileno())
            with self._bound_held():  # else one that adds up may miss it under both names
                os.replace(self._path(shard).with_suffix(".part"), self._path(shard))
            return True

    @contextlib.contextmanager
    def _part(self, shard: Shard) -> Iterator[IO[bytes] | None]:
        """Return the locked file to write `shard` to, room for it made; None where it is there or in other hands."""
        path = self._path(shard).with_suffix(".part")
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if self._path(shard).exists() or not _is_at(file, path):
                if _is_at(file, path):
                    path.unlink()
                yield None
                return
            try:
                self._reserve(file, shard)
                yield file
            finally:
                if _is_at(file, path):  # not finished
                    path.unlink()

    @contextlib.contextmanager
    def _bound_held(self) -> Iterator[None]:
        """Be the only process of the node that adds to the folder or adds up what it holds."""
        with open(self.folder / LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, part: IO[bytes], shard: Shard) -> None:
        with self._bound_held():
            part.truncate(0)  # what a killed process had reserved
            over = sum(_sizes(self.folder).values()) + shard.bytes - self.bound
            if over > 0:
                over -= self._evict(over)
            if over > 0:
                raise NoRoom(f"data.cache_gb={self.bound / 1e9:g} has no room for its {shard.bytes} bytes")
            part.truncate(shard.bytes)
            _allocate(part, shard.bytes)

    def _evict(self, wanted: int) -> int:
        """Remove shards of sets that no process uses, least recently used first; the bytes that became free."""
        freed = 0
        for use in sorted(self.folder.glob(f"*/{IN_USE}"), key=lambda p: p.stat().st_mtime):
            with open(use, "a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                for path, size in _sizes(use.parent).items():
                    if freed < wanted:
                        path.unlink()
                        freed += size
        return freed


def _allocate(file: IO[bytes], size: int) -> None:
    """Take the disk blocks of `size` bytes, so that a full disk is known before they are fetched; where it can be done."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # what file systems say that cannot
            raise


def _sizes(folder: Path) -> dict[Path, int]:
    """Bytes of every shard below `folder`, whole ones and parts; one may go while this looks."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in (".tar", ".part"):
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.stat().st_size
    return found


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return True where `path` still names the open `file`: another may have moved or removed it before it was locked."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
