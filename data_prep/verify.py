"""Hold shards against their manifest: counts, sizes, sha256, and every member's name, offset and crc32."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

import numpy as np

from data_prep.executor import LocalExecutor, Task
from data_prep.progress import Progress
from data_prep.tasks import patiently
from vswin_dist import storage
from vswin_dist.errors import DataError, StorageError, WorkFailed, before_start
from vswin_dist.manifest import Manifest, Sample, Shard, read_manifest, shard_url

CHUNK = 1 << 20


@dataclass(frozen=True)
class ShardTask:
    """One shard to check."""

    number: int
    url: str
    shard: Shard
    samples: list[Sample]


def verify_dataset(url: str, workers: int | None = None, show_progress: bool = True) -> dict[int, list[str]]:
    """Check every shard of the dataset at `url`.

    Returns:
        What is wrong with each, by shard number; -1 stands for the folder. Empty is well.

    Raises:
        DataError: the manifest is absent or damaged. PreflightError: the storage fails.
    """
    with before_start():
        return _verify(url, workers or os.cpu_count() or 1, show_progress)


def _verify(url: str, workers: int, show_progress: bool) -> dict[int, list[str]]:
    manifest = read_manifest(url)
    manifest.check(url)
    wrong: dict[int, list[str]] = {}
    if problems := [f"{name}: a shard that the manifest does not list" for name in extra_shards(manifest, url)]:
        wrong[-1] = problems
    if (found := replace(manifest).fingerprint) != manifest.fingerprint:
        wrong.setdefault(-1, []).append(f"the manifest says fingerprint {manifest.fingerprint}, its content has {found}")
    numbers = manifest.samples.numbers("shard")
    by_shard = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers[by_shard], np.arange(len(manifest.shards) + 1)).tolist()
    progress = Progress(len(manifest.shards), "shards", shown=show_progress)
    tasks = (
        Task(
            number,
            check_shard,
            ShardTask(number, shard_url(url, shard), shard, list(manifest.samples[by_shard[first:last]])),
        )
        for number, (shard, first, last) in enumerate(zip(manifest.shards, ends[:-1], ends[1:], strict=True))
    )
    with LocalExecutor(min(workers, max(1, len(manifest.shards)))) as pool:
        for done in pool.run(tasks):
            if problems := [done.crashed] if done.crashed else done.value:
                wrong[done.ticket] = problems
            progress.advance()
    progress.close()
    return dict(sorted(wrong.items()))


def extra_shards(manifest: Manifest, url: str) -> list[str]:
    """List tars beside the manifest that it does not list: a reader that takes `*.tar` would read them."""
    folder = storage.absolute(url)
    folder = folder.rsplit("/", 1)[0] if folder.endswith(".json") else folder
    listed = {shard.url for shard in manifest.shards}
    return [n for n in storage.list_names(folder) if n.endswith(".tar") and not n.startswith(".") and n not in listed]


def check_shard(task: ShardTask) -> list[str]:
    """Name every problem of one shard; empty is well."""
    name = task.shard.url
    try:
        found = storage.size(task.url)
    except FileNotFoundError:
        return [f"{name}: missing"]
    problems = []
    if found != task.shard.bytes:
        problems.append(f"{name}: {found} bytes, the manifest says {task.shard.bytes}")
    if task.shard.samples != len(task.samples):
        problems.append(f"{name}: {task.shard.samples} samples declared, {len(task.samples)} listed")
    try:
        wrong, sha256 = patiently(lambda: _read_through(task))
    except (OSError, WorkFailed) as error:  # also after a minute of trying again
        return [*problems, f"{name}: cannot be read: {error}"]
    problems += [f"{name}: {p}" for p in wrong]
    if sha256 != task.shard.sha256:
        problems.append(f"{name}: sha256 is {sha256}, the manifest says {task.shard.sha256}")
    return problems


def _read_through(task: ShardTask) -> tuple[list[str], str]:
    """Return what is wrong with the members, and the sha256; StorageError where remote storage fails, if for a moment."""
    try:
        with storage.open_read(task.url) as file:
            reader = _Hashing(file)
            wrong = list(_check_members(reader, task.samples))
            reader.drain()
    except (DataError, StorageError, FileNotFoundError):
        raise
    except Exception as error:
        if storage.is_local(task.url):
            raise
        raise StorageError(f"{task.url}: {type(error).__name__}: {error}", storage.retriable(error)) from error
    return wrong, reader.digest.hexdigest()


class _Hashing:
    """A file that hashes what is read through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data

    def drain(self) -> None:
        while self.read(CHUNK):
            pass


def _check_members(reader: _Hashing, samples: list[Sample]) -> Iterator[str]:
    expected = [(s, ext) for s in samples for ext in sorted(("cls", "json", s.extension))]
    position = 0
    try:
        # "r|" reads strictly forward, so that the hash sees every byte once
        with tarfile.open(fileobj=reader, mode="r|", bufsize=CHUNK) as tar:  # type: ignore[call-overload]
            for member in tar:
                if position >= len(expected):
                    yield f"member {member.name!r} is not in the manifest"
                    return
                sample, ext = expected[position]
                position += 1
                if member.name != f"{sample.key}.{ext}":
                    yield f"member {position} is {member.name!r}, expected {sample.key}.{ext}"
                    return
                if ext == sample.extension:
                    yield from _check_video(tar, member, sample)
                elif ext == "cls" and (text := _read(tar, member)) != str(sample.class_id).encode():
                    yield f"{member.name} says class {text!r}, the manifest {sample.class_id}"
    except tarfile.TarError as error:
        yield f"the tar breaks off after {position} of {len(expected)} members: {error}"
        return
    if position < len(expected):
        yield f"ends after {position} of {len(expected)} members"


def _check_video(tar: tarfile.TarFile, member: tarfile.TarInfo, sample: Sample) -> Iterator[str]:
    if (member.offset_data, member.size) != (sample.offset, sample.size):
        yield (
            f"{member.name} lies at {member.offset_data} with {member.size} bytes, the manifest says "
            f"{sample.offset} with {sample.size}"
        )
    elif zlib.crc32(_read(tar, member)) != sample.crc32:
        yield f"{member.name}: its bytes changed (crc32)"


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""
