"""Files on any fsspec URL: read, list, and put atomically, with retry and length check.

File systems are opened inside the process that uses them: an s3fs instance does not survive a fork, so no
object of this module is ever pickled or shared. Credentials come from the environment alone
(`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, an instance role); an endpoint other than AWS from
`AWS_ENDPOINT_URL_S3`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import random
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from vswin_dist import local_files
from vswin_dist.errors import DataError, StorageError, VswinError

T = TypeVar("T")
ATTEMPTS = 5
FIRST_WAIT_S = 0.25
AWAY_S = 1.0  # since the end of a call in vain, for which a store is asked once
_away: dict[str, float] = {}  # remote stores of which this process had no answer in the last call -> when that ended
CHUNK = 8 << 20
PART, PARALLEL_PARTS = 16 << 20, 8  # of an upload to S3: a part is a copy of its bytes
# Errors that another attempt cannot mend. s3fs maps S3's codes onto these classes.
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # nor these of a disk
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # botocore's, which is imported with the first URL


class Damaged(OSError):
    """Content that is not what was written: by the transfer, so that it is read again; else by the storage."""


def environment() -> dict[str, str]:
    """Return the variables by which this process reaches its storage, for one that may have been started with others."""
    return {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "VSWIN_"))}


def use_s3_endpoint(endpoint: str | None) -> None:
    """Let this process and its children, MLflow's artifact client among them, use another S3 endpoint than AWS."""
    if endpoint:
        os.environ["AWS_ENDPOINT_URL_S3"] = os.environ["MLFLOW_S3_ENDPOINT_URL"] = endpoint


def is_local(url: str) -> bool:
    """Return True where `url` is a path of this machine (no scheme, or `file://`)."""
    return "://" not in url or url.startswith(("file://", "local://"))


def absolute(url: str) -> str:
    """`url` with a local path made absolute, for a job that runs in another folder."""
    if not is_local(url):
        return url.rstrip("/")
    return str(local_files.expanded(url.removeprefix("file://").removeprefix("local://")))


def join(base: str, *parts: str) -> str:
    """Join URL parts with single slashes; a part that is itself absolute replaces what stands before."""
    for part in parts:
        base = part if "://" in part or part.startswith("/") else f"{base.rstrip('/')}/{part}"
    return base


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of `url` in this process, and the path in it.

    Raises:
        DataError: the scheme is unknown or its driver is not installed.
    """
    if is_local(url):  # not by `url_to_fs`, to which "::" in a file's name means one file system within another
        return fsspec.filesystem("file"), absolute(url)
    # Listings must be fresh: jobs look for what other processes have just written.
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        # Some S3 servers (rclone) send the whole object's checksum with a part of it, and botocore then refuses the
        # part. What we read is checked by length and by the manifest's crc32 and sha256.
        options["config_kwargs"] = {"response_checksum_validation": "when_required"}
        # Named here, although botocore reads it too: fsspec keeps one instance for equal arguments.
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3"):
            options["endpoint_url"] = endpoint
    try:
        fs, path = url_to_fs(absolute(url), **options)
    except (ValueError, ImportError) as error:
        raise DataError(f"cannot open {url!r}: {error}") from error
    return fs, path


def retriable(error: BaseException) -> bool:
    """Say whether another attempt at what raised `error` may succeed: the storage may be away for a moment."""
    if isinstance(error, StorageError):
        return error.retriable
    if isinstance(error, (VswinError, *FINAL_ERRORS)) or type(error).__name__ in NO_CREDENTIALS:
        return False
    return isinstance(error, Exception) and getattr(error, "errno", None) not in FULL


def _translate(error: Exception, url: str, attempts: int = 1) -> Exception:
    """Return the error for users that stands for `error`, met at `url` in the last of `attempts`."""
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url} does not exist")
    if isinstance(error, PermissionError):
        message = f"no access to {url}: {error or 'permission denied'}. Check the credentials in the environment."
        return StorageError(message, retriable=False, errno=number or errno.EACCES)  # s3fs gives none
    if type(error).__name__ in NO_CREDENTIALS:
        message = f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role."
        return StorageError(message, retriable=False)
    if isinstance(error, (VswinError, *FINAL_ERRORS)):  # says already what is wrong, or what a caller asks for
        return error
    if isinstance(error, Damaged):
        return DataError(f"{url}: {error} (after {attempts} attempts)")
    tried = f" (after {attempts} attempts)" if attempts > 1 else ""
    return StorageError(f"{url}: {type(error).__name__}: {error}{tried}", retriable(error), number)


def with_retry(action: Callable[[], T], url: str) -> T:
    """Call `action` up to five times with growing, jittered waits; what no attempt mends is raised at once.

    A store of which all attempts have just failed is asked once, until it answers: what ends for want of it asks several
    times more, one call after the other, and each of these would take as long. Who waits before has all attempts again.

    Raises:
        FileNotFoundError: `url` is absent.
        StorageError: no access, or every attempt failed.
        DataError: every attempt brought damaged content.
    """
    store = "" if is_local(url) else "/".join(url.split("/", 3)[:3])  # s3://BUCKET
    attempts = 1 if store and time.monotonic() - _away.get(store, -math.inf) < AWAY_S else ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            result = action()
        except Exception as error:
            # A full disk may have room within seconds, though not for certain. A StorageError was retried already.
            repeat = (retriable(error) or getattr(error, "errno", None) in FULL) and not isinstance(error, StorageError)
            if attempt < attempts and repeat:
                time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * (0.5 + random.random()))  # noqa: S311 - jitter only
                continue
            translated = _translate(error, url, attempt)
            if isinstance(translated, StorageError) and translated.retriable:
                _away[store] = time.monotonic()
            else:
                _away.pop(store, None)
            if translated is error:
                raise
            raise translated from error
        _away.pop(store, None)
        return result
    raise AssertionError("unreachable")


def exists(url: str) -> bool:
    """Return True where a file or a folder stands at `url`."""

    def check() -> bool:
        fs, path = filesystem(url)
        return bool(fs.exists(path))

    return with_retry(check, url)


def is_file(url: str) -> bool:
    """Return True where a file stands at `url`."""

    def check() -> bool:
        fs, path = filesystem(url)
        return bool(fs.isfile(path))

    return with_retry(check, url)


def size(url: str) -> int:
    """Bytes of the file at `url`."""

    def check() -> int:
        fs, path = filesystem(url)
        return int(fs.size(path))

    return with_retry(check, url)


def modified(url: str) -> float:
    """When the file at `url` was written, in seconds since 1970 by the storage's clock."""

    def check() -> float:
        fs, path = filesystem(url)
        return float(fs.modified(path).timestamp())

    return with_retry(check, url)


def read_bytes(url: str) -> bytes:
    """Return the whole file at `url`."""

    def read() -> bytes:
        fs, path = filesystem(url)
        return bytes(fs.cat_file(path))

    return with_retry(read, url)


def read_range(url: str, offset: int, length: int, crc32: int | None = None) -> bytes:
    """Read `length` bytes of `url` from `offset`; fewer, or with another `crc32`, are an error, retried first.

    Raises:
        FileNotFoundError: `url` is absent.
        DataError: the file ends before `offset + length`, or holds other bytes.
        StorageError: the storage fails.
    """

    def read() -> bytes:
        fs, path = filesystem(url)
        data = bytes(fs.cat_file(path, start=offset, end=offset + length))
        if len(data) != length:
            raise Damaged(f"got {len(data)} of {length} bytes at offset {offset}: the file is cut short")
        if crc32 is not None and zlib.crc32(data) != crc32:
            raise Damaged(
                f"the {length} bytes at offset {offset} are damaged (crc32 {zlib.crc32(data):08x}, expected {crc32:08x})"
            )
        return data

    return with_retry(read, url)


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """Open a stream over the file at `url`."""
    fs, path = filesystem(url)
    try:
        stream = with_retry(lambda: fs.open(path, "rb"), url)
        with stream:
            yield stream
    except FINAL_ERRORS as error:
        raise _translate(error, url) from error


def sha256(url: str) -> str:
    """Hash the file at `url`, a part at a time."""
    digest = hashlib.sha256()
    with open_read(url) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def list_names(url: str) -> list[str]:
    """Return the names (not paths) directly below the folder `url`, sorted; `[]` where there is none."""

    def read() -> list[str]:
        fs, path = filesystem(url)
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(p).rstrip("/").rsplit("/", 1)[-1] for p in found if str(p).rstrip("/") != path.rstrip("/")})

    return with_retry(read, url)


def find(url: str) -> list[str]:
    """Return the paths of all files below the folder `url`, relative to it, sorted; `[]` where there is none."""

    def read() -> list[str]:
        fs, path = filesystem(url)
        start = path.rstrip("/") + "/"
        return sorted(str(p).removeprefix(start) for p in fs.find(path) if str(p).startswith(start))

    return with_retry(read, url)


def list_sizes(url: str) -> dict[str, int]:
    """Return the name and the bytes of each file directly below the folder `url`; `{}` where there is none."""

    def read() -> dict[str, int]:
        fs, path = filesystem(url)
        try:
            found = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        return {str(f["name"]).rsplit("/", 1)[-1]: int(f["size"]) for f in found if f["type"] == "file"}

    return with_retry(read, url)


def put_bytes(url: str, data: bytes | memoryview) -> None:
    """Write `data` to `url` so that a reader sees the old file or the whole new one, never a part.

    Large data goes to S3 in parallel parts; a `memoryview` is never copied as a whole.
    """

    def write() -> None:
        fs, path = filesystem(url)
        if is_local(url):
            with local_files.write_atomically(path) as temporary:
                temporary.write_bytes(data)
        else:
            _pipe(fs, path, data)
        _check_length(fs, path, len(data))

    with_retry(write, url)


def create_bytes(url: str, data: bytes) -> bool:
    """Write `data` to `url` unless something stands there; returns whether it does now.

    Of several who do so at once one alone is told True, on a local disk (NFS included) and on an object store that knows
    conditional writes: see `creates_once`.

    Args:
        data: unlike anybody else's. An answer that was lost is then told from a file of another.
    """

    def create() -> bool:
        return _created(url, data) or read_bytes(url) == data

    return with_retry(create, url)


def creates_once(url: str, data: bytes) -> bool:
    """Return True where the storage refuses to create the file that `create_bytes` has just made of `data`.

    Amazon's S3 does so, and most others; rclone's S3 server and old releases of other stores overwrite it.
    """
    return not with_retry(lambda: _created(url, data), url)


def _created(url: str, data: bytes) -> bool:
    fs, path = filesystem(url)
    try:
        if is_local(url):
            local_files.create(path, data)
        else:
            fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        answer = getattr(error.__cause__, "response", {})  # of S3
        code = answer.get("Error", {}).get("Code")
        if code == "PreconditionFailed":
            return False
        if code != "NotImplemented":
            raise
        fs.pipe_file(path, data)
    return True


def put_file(local: str | Path, url: str) -> None:
    """Copy a local file to `url`, atomically as in `put_bytes`; the length is compared afterwards."""
    source = Path(local)

    def write() -> None:
        fs, path = filesystem(url)
        if is_local(url):
            with local_files.write_atomically(path) as temporary:
                _copy(source, temporary)
        else:
            fs.put_file(str(source), path)
        _check_length(fs, path, source.stat().st_size)

    with_retry(write, url)


def get_file(url: str, local: str | Path) -> None:
    """Copy `url` to a local file, which appears whole or not at all."""

    def read() -> None:
        fs, path = filesystem(url)
        expected = int(fs.size(path))

        with local_files.write_atomically(local) as temporary:
            fs.get_file(path, str(temporary))
            if (found := temporary.stat().st_size) != expected:
                raise OSError(f"got {found} of {expected} bytes")

    with_retry(read, url)


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Give the path of the file at `url` on this machine: its own, or that of a copy which goes with the block."""
    if is_local(url):
        yield Path(absolute(url))
    else:
        with tempfile.TemporaryDirectory() as folder:
            get_file(url, path := Path(folder, "copy"))
            yield path


def remove(url: str, recursive: bool = False) -> None:
    """Remove the file (or with `recursive` the folder) at `url`; absent is fine."""

    def delete() -> None:
        fs, path = filesystem(url)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=recursive)

    with_retry(delete, url)


def move(url: str, target: str) -> None:
    """Move the folder at `url` to `target`, on the same storage; on an object store, each file is copied, then removed."""

    def rename() -> None:
        fs, path = filesystem(url)
        if is_local(url):
            os.rename(path, filesystem(target)[1])
        else:
            fs.mv(path, filesystem(target)[1], recursive=True)

    with_retry(rename, url)


def check_writable(url: str) -> None:
    """Write and remove a small file below the folder `url`.

    Raises:
        StorageError: it cannot be written; names the URL.
    """
    probe = join(url, f".write-check-{uuid.uuid4().hex}")
    try:
        put_bytes(probe, b"ok")
        remove(probe)
    except (OSError, StorageError) as error:
        raise StorageError(f"cannot write to {url}: {error}", retriable(error), error.errno) from error


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)


class _Parts:
    """Bytes that s3fs cuts into the parts of an upload: each is copied when it is sent."""

    def __init__(self, data: memoryview) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self.data[part])


def _pipe(fs: fsspec.AbstractFileSystem, path: str, data: bytes | memoryview) -> None:
    if len(data) < 2 * PART:
        fs.pipe_file(path, bytes(data))
    elif "s3" in fs.protocol:
        fs.pipe_file(path, _Parts(memoryview(data)), chunksize=PART, max_concurrency=PARALLEL_PARTS)
    else:
        with fs.open(path, "wb") as writer:
            for start in range(0, len(data), CHUNK):
                writer.write(data[start : start + CHUNK])


def _check_length(fs: fsspec.AbstractFileSystem, path: str, expected: int) -> None:
    found = int(fs.size(path))
    if found != expected:
        raise OSError(f"wrote {expected} bytes, the storage holds {found}")
