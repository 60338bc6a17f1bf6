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
from vswin_dist.errors import DataError, WorkFailed

CHUNK = 1 << 20


@dataclass(frozen=True)
class Member:
    """One regular file of an archive, or the `refusal` of one that must not be used."""

    name: str
    data: bytes
    refusal: str = ""


class JoinedReader:
    """The files at `urls` read one after the other, as `cat` would. A read that fails is repeated from its place."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._number = 0
        self._offset = 0
        self._file: IO[bytes] | None = None
        self.count = 0  # bytes read so far

    def read(self, size: int = CHUNK) -> bytes:
        """Up to `size` bytes; ``b""`` at the end of the last file."""
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
                fs, path = storage.filesystem(url)
                self._file = fs.open(path, "rb")
                if self._offset:
                    self._file.seek(self._offset)
            return self._file.read(size)
        except FileNotFoundError as error:
            raise WorkFailed(f"archive {url} does not exist any more") from error
        except Exception as error:
            self.close()
            raise DataError(f"{url} at byte {self._offset}: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()
            self._file = None


def members(urls: list[str], wanted: Any) -> Iterator[Member]:
    """Every regular file of the tar (plain or compressed) that the files at `urls` make up, in its order.

    Only the bytes of members whose name `wanted` accepts are read. Links, devices and names that are absolute or
    climb with ``..`` are given as refusals, never as data; folders and hidden files are passed over.

    Raises:
        WorkFailed: the archive is damaged or breaks off.
    """
    reader = JoinedReader(urls)
    count = 0
    try:
        with tarfile.open(fileobj=reader, mode="r|*", bufsize=CHUNK) as tar:  # type: ignore[call-overload]
            for info in tar:
                tar.members = []  # tarfile would remember every header
                count += 1
                if refusal := _refusal(info):
                    yield Member(info.name, b"", refusal)
                elif info.isfile() and not info.name.rsplit("/", 1)[-1].startswith("."):
                    yield Member(info.name, _bytes(tar, info) if wanted(info.name) else b"")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise WorkFailed(f"archive {urls[0]} is damaged after {count} members, {reader.count:,} bytes: {error}. "
                         "Get it again, then run the same command again.") from error
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
        return "no regular file"
    if info.size > MAX_BYTES:
        return f"more than {MAX_BYTES >> 20} MiB"
    return ""


def _bytes(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    data = file.read() if file else b""
    if len(data) != info.size:
        raise EOFError(f"{info.name} breaks off after {len(data)} of {info.size} bytes")
    return data
