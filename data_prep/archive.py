"""Tar archives as streams: members in sequence from any URL, nothing unpacked to disk, cut archives joined."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from data_prep.probe import MAX_BYTES
from data_prep.tasks import patiently
from vswin_dist import storage
from vswin_dist.errors import StorageError, VswinError, WorkFailed

CHUNK = 1 << 20
BLOCK = 512  # of a tar


@dataclass(frozen=True)
class Member:
    """One regular file of an archive, or the `refusal` of one that must not be used."""

    name: str
    data: bytes
    refusal: str = ""


class JoinedReader:
    """The files at `urls` read one after the other, as `cat` would. A read that fails is repeated from its offset."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._number = 0
        self._offset = 0
        self._file: IO[bytes] | None = None
        self._ahead = b""
        self._ranges = True  # whether files can be read from any offset; some web servers cannot
        self.count = 0  # bytes read so far

    def peek(self) -> bytes:
        """Look at what `read` will give next."""
        self._ahead = self._ahead or self.read()
        return self._ahead

    def read(self, size: int = CHUNK) -> bytes:
        """Read up to `size` bytes (or what `peek` showed); `b""` at the end of the last file."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        while self._number < len(self._urls):
            data = patiently(lambda: self._read_once(size))
            if data:
                self._offset += len(data)
                self.count += len(data)
                return data
            self.close()
            self._number, self._offset = self._number + 1, 0
        return b""

    def _read_once(self, size: int) -> bytes:
        url = self._urls[self._number]
        try:
            if self._file is None:
                self._file = _open_at(url, self._offset) if self._ranges else _stream_from(url, self._offset)
            return self._file.read(size)
        except FileNotFoundError as error:
            raise WorkFailed(f"archive {url} does not exist any more") from error
        except Exception as error:
            self.close()
            if isinstance(error, VswinError):
                raise
            if isinstance(error, ValueError) and self._ranges and url.startswith("http"):
                self._ranges = False
                return self._read_once(size)
            message = f"{url} at byte {self._offset}: {type(error).__name__}: {error}"
            raise StorageError(message, storage.retriable(error), getattr(error, "errno", None)) from error

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _open_at(url: str, offset: int) -> IO[bytes]:
    fs, path = storage.filesystem(url)
    file: IO[bytes] = fs.open(path, "rb")
    if offset:
        file.seek(offset)
    return file


def _stream_from(url: str, offset: int) -> IO[bytes]:
    """One request for the whole file, of which the first `offset` bytes are read and dropped."""
    import aiohttp
    import fsspec

    patient = aiohttp.ClientTimeout(total=None, sock_read=60)  # as long as it takes; aiohttp's own limit is 5 minutes
    file: IO[bytes] = fsspec.filesystem("http", client_kwargs={"timeout": patient}).open(url, "rb", block_size=0)
    while offset:
        data = file.read(min(offset, CHUNK))
        if not data:
            raise EOFError("it is shorter than before")
        offset -= len(data)
    return file


class _Stream:
    """The tar within `reader`'s bytes, plain or gzip in any number of members; checksums are checked.

    tarfile's own gzip streams end quietly where the file breaks off, and ignore checksums and further members.
    """

    def __init__(self, reader: JoinedReader) -> None:
        self._reader = reader
        self._inflate = zlib.decompressobj(31) if reader.peek()[:2] == b"\x1f\x8b" else None
        self._compressed = b""
        self._tail = b""

    def read(self, size: int) -> bytes:
        data = self._inflated(size) if self._inflate else self._reader.read(size)
        if data:
            self._tail = data[-BLOCK:] if len(data) >= BLOCK else (self._tail + data)[-BLOCK:]
        return data

    def _inflated(self, size: int) -> bytes:
        assert self._inflate is not None
        while data := self._compressed or self._reader.read():
            if self._inflate.eof:
                data = data.lstrip(b"\0")  # padding between members
                self._inflate = zlib.decompressobj(31) if data else self._inflate
            made = self._inflate.decompress(data, size) if data else b""
            self._compressed = self._inflate.unconsumed_tail or (data and self._inflate.unused_data)
            if made:
                return made
        if not self._inflate.eof:
            raise EOFError("the gzip stream breaks off")
        return b""

    def finish(self) -> None:
        """Read on to the end. Raises EOFError where the tar lacks its end mark, a block of zeros."""
        while self.read(CHUNK):
            pass
        if len(self._tail) < BLOCK or self._tail.strip(b"\0"):
            raise EOFError("it breaks off")


def members(urls: list[str], wanted: Any) -> Iterator[Member]:
    """Yield every regular file of the tar (plain or compressed) that the files at `urls` make up, in its order.

    Only the bytes of members whose name `wanted` accepts are read. Links, devices and names that are absolute or
    climb with `..` are given as refusals, never as data; folders and hidden files are skipped.

    Raises:
        WorkFailed: the archive is damaged or breaks off.
    """
    reader = JoinedReader(urls)
    count = 0
    try:
        stream = _Stream(reader)
        with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar:  # type: ignore[call-overload]
            for info in tar:
                tar.members = []  # tarfile would remember every header
                count += 1
                name = info.name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # as UTF-8 text
                if refusal := _refusal(info):
                    yield Member(name, b"", refusal)
                elif info.isfile() and not name.rsplit("/", 1)[-1].startswith("."):
                    yield Member(name, _bytes(tar, info) if wanted(name) else b"")
        stream.finish()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise WorkFailed(
            f"archive {urls[0]} is damaged after {count} members, {reader.count:,} bytes: {error}. "
            + (
                "What it gave so far may be wrong: get it again, remove the output and start anew."
                if "data check" in str(error)
                else "Get it again, then run the same command again."
            )
        ) from error
    finally:
        reader.close()


def _refusal(info: tarfile.TarInfo) -> str:
    parts = info.name.replace("\\", "/").split("/")
    if info.name.startswith(("/", "\\")) or (len(info.name) > 1 and info.name[1] == ":"):
        return "absolute path"
    if ".." in parts:
        return "path with '..'"
    if info.issym() or info.islnk():
        return "link"
    if not (info.isfile() or info.isdir()):
        return "not a regular file"
    if info.size > MAX_BYTES:
        return f"more than {MAX_BYTES >> 20} MiB"
    return ""


def _bytes(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    data = file.read() if file else b""
    if len(data) != info.size:
        raise EOFError(f"{info.name} breaks off after {len(data)} of {info.size} bytes")
    return data
