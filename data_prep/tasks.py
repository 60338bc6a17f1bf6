"""What worker processes run: one video, or one shard. Arguments and results are small; bytes go through the storage."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data_prep import pack
from data_prep.encode import Outcome, process
from data_prep.journal import Record, Staging
from data_prep.probe import MAX_BYTES
from data_prep.settings import Encoding
from vswin_dist import storage
from vswin_dist.errors import DataError, WorkFailed

T = TypeVar("T")
# Storage that fails is waited for, on top of the seconds that `storage` itself tries: a restart of a server or a
# minute of throttling must not end a run of days.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no waiting helps
WAITS_S = (2.0, 4.0, 8.0, 16.0, 30.0)


@dataclass(frozen=True)
class SampleTask:
    """One video to verify and encode. `data` where the driver has read it already (archives)."""

    slot: int
    source_id: str
    url: str
    encoding: Encoding
    staging: str
    data: bytes | None = None


def patiently(action: Callable[[], T]) -> T:
    """Call `action`, again after growing waits while the storage fails.

    Raises:
        WorkFailed: it kept failing, or this machine's disk is full.
    """
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except (DataError, OSError) as error:
            if isinstance(error, OSError) or isinstance(error.__cause__, PermissionError):
                raise
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
                raise error.__cause__ from None
            if wait_s is None:
                raise WorkFailed(f"the storage keeps failing: {error}. Run the same command again to go on.") from error
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def process_sample(task: SampleTask) -> Outcome:
    """Read, verify, encode and stage one video; a rejected one is staged as its verdict alone."""
    outcome, payload = _outcome(task)
    if payload is None:
        return outcome
    try:
        patiently(lambda: Staging(task.staging).put(task.slot, outcome, payload))
    except OSError as error:
        raise WorkFailed(f"cannot write below {task.staging}: {error}. "
                         "Make room and run the same command again.") from error
    return outcome


def _outcome(task: SampleTask) -> tuple[Outcome, bytes | None]:
    """The outcome and what to stage: None for nothing, where the outcome may change without the dataset changing."""
    try:
        if task.data is None:
            if patiently(lambda: storage.size(task.url)) > MAX_BYTES:
                return Outcome("too_large", f"more than {MAX_BYTES >> 20} MiB"), b""
            data = patiently(lambda: storage.read_bytes(task.url))
        else:
            data = task.data
    except FileNotFoundError:
        return Outcome("missing_video", "the file vanished after it was listed"), b""
    except IsADirectoryError:
        return Outcome("unreadable", "it is a folder"), b""
    except DataError as error:
        return Outcome("unreadable", str(error)), b""
    except OSError as error:
        return Outcome("unreadable", f"{type(error).__name__}: {error.strerror or error}"), b""
    outcome, made = process(data, task.encoding, task.source_id)
    stays = outcome.kept and task.data is None and not task.encoding.transcodes
    return outcome, b"" if stays else made


def pack_shard(task: pack.PackTask) -> Record:
    """Write one shard and its record."""
    try:
        return patiently(lambda: pack.pack(task))
    except OSError as error:
        raise WorkFailed(f"cannot write shard {task.number} to {task.out}: {error}. "
                         "Make room and run the same command again.") from error
