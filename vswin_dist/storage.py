"""Files on any fsspec URL: read, list, and put atomically, with retry and length check.

File systems are opened inside the process that uses them: an s3fs instance does not survive a fork, so no
object of this module is ever pickled or shared. Credentials come from the environment alone
(``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, an instance role); an endpoint other than AWS from
``AWS_ENDPOINT_URL_S3``.
"""

from __future__ import annotations

import contextlib
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

from vswin_dist.errors import DataError

T = TypeVar("T")
ATTEMPTS = 5
FIRST_WAIT_S = 0.25
CHUNK = 8 << 20
# Errors that another attempt cannot mend. s3fs maps S3's codes onto these classes.
FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


def home() -> Path:
    """The data root: ``VSWIN_HOME``, else ``~/vswin``. Holds what no setting places elsewhere."""
    return Path(os.environ.get("VSWIN_HOME") or Path.home() / "vswin").expanduser().absolute()


def cache_home() -> Path:
    """Where a node keeps copies of shards on its own disk: ``VSWIN_CACHE``, else this user's ``vswin-cache-UID`` in the
    temporary folder."""
    own = Path(tempfile.gettempdir()) / f"vswin-cache-{os.getuid()}"
    return Path(os.environ.get("VSWIN_CACHE") or own).expanduser().absolute()


def environment() -> dict[str, str]:
    """The variables by which this process reaches its storage, for one that may have been started with others."""
    return {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "VSWIN_"))}


def use_s3_endpoint(endpoint: str | None) -> None:
    """Let this process and its children, MLflow's artifact client among them, use another S3 endpoint than AWS."""
    if endpoint:
        os.environ["AWS_ENDPOINT_URL_S3"] = os.environ["MLFLOW_S3_ENDPOINT_URL"] = endpoint


def is_local(url: str) -> bool:
    """True where `url` is a path of this machine (no scheme, or ``file://``)."""
    return "://" not in url or url.startswith(("file://", "local://"))


def absolute(url: str) -> str:
    """`url` with a local path made absolute, for a job that runs in another folder."""
    if not is_local(url):
        return url.rstrip("/")
    return str(Path(url.removeprefix("file://").removeprefix("local://")).expanduser().absolute())


def join(base: str, *parts: str) -> str:
    """Join URL parts with single slashes; a part that is itself absolute replaces what stands before."""
    for part in parts:
        base = part if "://" in part or part.startswith("/") else f"{base.rstrip('/')}/{part}"
    return base


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` in this process, and the path in it.

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


def _translate(error: BaseException, url: str) -> BaseException:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url} does not exist")
    if isinstance(error, PermissionError):
        return DataError(f"no access to {url}: {error or 'permission denied'}. Check the credentials in the environment.")
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return DataError(f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role.")
    return error


def with_retry(action: Callable[[], T], url: str) -> T:
    """Call `action` up to five times with growing, jittered waits; final errors are raised at once.

    Raises:
        FileNotFoundError: `url` is absent. DataError: no access, or every attempt failed.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FINAL_ERRORS as error:
            raise _translate(error, url) from error
        except DataError:  # says already what is wrong
            raise
        except Exception as error:
            translated = _translate(error, url)
            if translated is not error:
                raise translated from error
            if attempt == ATTEMPTS:
                raise DataError(f"{url}: {type(error).__name__}: {error} (after {ATTEMPTS} attempts)") from error
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * (0.5 + random.random()))  # noqa: S311 - jitter only
    raise AssertionError("unreachable")


def exists(url: str) -> bool:
    """True where a file or a folder stands at `url`."""
    def check() -> bool:
        fs, path = filesystem(url)
        return bool(fs.exists(path))
    return with_retry(check, url)


def size(url: str) -> int:
    """Bytes of the file at `url`."""
    def check() -> int:
        fs, path = filesystem(url)
        return int(fs.size(path))
    return with_retry(check, url)


def read_bytes(url: str) -> bytes:
    """The whole file at `url`."""
    def read() -> bytes:
        fs, path = filesystem(url)
        return bytes(fs.cat_file(path))
    return with_retry(read, url)


def read_range(url: str, offset: int, length: int, crc32: int | None = None) -> bytes:
    """`length` bytes of `url` from `offset`; fewer, or with another `crc32`, is an error, tried again first.

    Raises:
        FileNotFoundError: `url` is absent. DataError: the file ends before ``offset + length``, or holds other bytes.
    """
    def read() -> bytes:
        fs, path = filesystem(url)
        data = bytes(fs.cat_file(path, start=offset, end=offset + length))
        if len(data) != length:
            raise OSError(f"got {len(data)} of {length} bytes at offset {offset}: the file is cut short")
        if crc32 is not None and zlib.crc32(data) != crc32:
            raise OSError(f"the {length} bytes at offset {offset} are damaged (crc32 {zlib.crc32(data):08x}, "
                          f"expected {crc32:08x})")
        return data
    return with_retry(read, url)


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """A stream over the file at `url`."""
    fs, path = filesystem(url)
    try:
        stream = with_retry(lambda: fs.open(path, "rb"), url)
        with stream:
            yield stream
    except FINAL_ERRORS as error:
        raise _translate(error, url) from error


def list_names(url: str) -> list[str]:
    """The names (not paths) directly below the folder `url`, sorted; ``[]`` where there is none."""
    def read() -> list[str]:
        fs, path = filesystem(url)
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted({str(p).rstrip("/").rsplit("/", 1)[-1] for p in found if str(p).rstrip("/") != path.rstrip("/")})
    return with_retry(read, url)


def put_bytes(url: str, data: bytes) -> None:
    """Write `data` to `url` so that a reader sees the old file or the whole new one, never a part."""
    def write() -> None:
        fs, path = filesystem(url)
        if is_local(url):
            _put_local(path, lambda target: Path(target).write_bytes(data))
        else:
            fs.pipe_file(path, data)
        _check_length(fs, path, len(data))
    with_retry(write, url)


def put_file(local: str | Path, url: str) -> None:
    """Copy a local file to `url`, atomically as in `put_bytes`; the length is compared afterwards."""
    source = Path(local)

    def write() -> None:
        fs, path = filesystem(url)
        if is_local(url):
            _put_local(path, lambda target: _copy(source, Path(target)))
        else:
            fs.put_file(str(source), path)
        _check_length(fs, path, source.stat().st_size)
    with_retry(write, url)


def get_file(url: str, local: str | Path) -> None:
    """Copy `url` to a local file, which appears whole or not at all."""
    def read() -> None:
        fs, path = filesystem(url)
        expected = int(fs.size(path))

        def fetch(target: str) -> None:
            fs.get_file(path, target)
            if os.path.getsize(target) != expected:
                raise OSError(f"got {os.path.getsize(target)} of {expected} bytes")
        _put_local(str(local), fetch)
    with_retry(read, url)


def remove(url: str, recursive: bool = False) -> None:
    """Remove the file (or with `recursive` the folder) at `url`; absent is fine."""
    def delete() -> None:
        fs, path = filesystem(url)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=recursive)
    with_retry(delete, url)


def check_writable(url: str) -> None:
    """Write and remove a small file below the folder `url`.

    Raises:
        DataError: it cannot be written; names the URL.
    """
    probe = join(url, f".write-check-{uuid.uuid4().hex}")
    try:
        put_bytes(probe, b"ok")
        remove(probe)
    except (OSError, DataError) as error:
        raise DataError(f"cannot write to {url}: {error}") from error


def _put_local(path: str, write: Callable[[str], Any]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(str(temporary))
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)


def _check_length(fs: fsspec.AbstractFileSystem, path: str, expected: int) -> None:
    found = int(fs.size(path))
    if found != expected:
        raise OSError(f"wrote {expected} bytes, the storage holds {found}")
