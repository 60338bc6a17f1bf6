"""What worker processes run: one video, or one shard. Arguments and results are small; bytes go through the storage."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from data_prep import pack
from data_prep.encode import Outcome, process
from data_prep.journal import ShardRecord, Staging
from data_prep.probe import MAX_BYTES
from data_prep.settings import Encoding
from data_prep.sources.items import Item
from vswin_dist import storage
from vswin_dist.errors import StorageError, WorkFailed

T = TypeVar("T")
RESUME = "Run the same command again to resume."
REFUSED = (errno.EACCES, errno.EPERM)
# Storage that fails is waited for, on top of the seconds that `storage` itself tries: a restart of a server or a
# minute of throttling must not end a run of days.
WAITS_S = (2.0, 4.0, 8.0, 16.0, 30.0)


@dataclass(frozen=True)
class SampleTask:
    """One video to verify and encode; `index` numbers the videos as they are handed out (see `order`)."""

    index: int
    item: Item
    data: bytes | None = None  # where the driver has read it already (archives)


def patiently(action: Callable[[], T]) -> T:
    """Call `action`, again after growing waits while the storage fails.

    Raises:
        WorkFailed: it kept failing. StorageError: waiting does not help, as without access or with a full disk.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except StorageError as error:
            if not error.retriable or error.errno in storage.FULL:
                raise
            if wait_s is None:
                raise WorkFailed(f"the storage keeps failing: {error}. {RESUME}") from error
            time.sleep(wait_s)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    """Say what to do where `what` cannot be written.

    Raises:
        WorkFailed: instead of an OSError, and of the StorageError of a full disk.
    """
    try:
        yield
    except (OSError, StorageError) as error:
        if isinstance(error, StorageError) and error.errno not in storage.FULL:
            raise
        raise WorkFailed(f"cannot write {what}: {error}. Make room and run the same command again.") from error


def process_sample(encoding: Encoding, staging: str, task: SampleTask) -> Outcome:
    """Read, verify, encode and stage one video; a rejected one is staged as its verdict alone."""
    outcome, payload = _outcome(encoding, task)
    if payload is None:
        return outcome
    with _writing(f"below {staging}"):
        patiently(lambda: Staging(staging).put(task.index, outcome, payload))
    return outcome


def _outcome(encoding: Encoding, task: SampleTask) -> tuple[Outcome, bytes | None]:
    """Return the outcome and what to stage: None for nothing, where the outcome may change without the dataset changing."""
    url = task.item.url
    try:
        if task.data is None:
            if patiently(lambda: storage.size(url)) > MAX_BYTES:
                return Outcome("too_large", f"more than {MAX_BYTES >> 20} MiB"), b""
            data = patiently(lambda: storage.read_bytes(url))
        else:
            data = task.data
    except FileNotFoundError as error:
        _check_folder(url, error)
        return Outcome("missing_video", "the file vanished after it was listed"), None
    except IsADirectoryError:
        return Outcome("unreadable", "it is a folder"), b""
    except StorageError as error:
        if error.errno not in REFUSED:  # not of this video alone
            raise
        _check_folder(url, error)
        return Outcome("unreadable", str(error)), None
    except OSError as error:
        return Outcome("unreadable", f"{type(error).__name__}: {error.strerror or error}"), b""
    outcome, made = process(data, encoding, task.item.name, task.item.stretch)
    stays = outcome.kept and task.data is None and not encoding.transcodes
    return outcome, b"" if stays else made


def _check_folder(url: str, met: Exception) -> None:
    """Check that the folder of the file at `url`, which is absent or refused, answers: then it is this file alone.

    Raises:
        WorkFailed: it does not, or holds nothing, as where a mount has dropped.
    """
    folder = url.rpartition("/")[0]
    try:
        names, why = patiently(lambda: storage.list_names(folder)), "it holds nothing"
    except (OSError, StorageError) as error:
        names, why = [], str(error)
    if not names:
        raise WorkFailed(
            f"the videos cannot be reached any more: {str(met).rstrip('.')}; of their folder {folder}: {why.rstrip('.')}. "
            f"See that it is there and may be read. {RESUME}"
        ) from met


def pack_shard(task: pack.PackTask) -> ShardRecord:
    """Write one shard and its record."""
    with _writing(f"shard {task.number} to {task.out}"):
        return patiently(lambda: pack.pack(task))
