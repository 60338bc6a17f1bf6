"""Entries into one plain WebDataset tar, published atomically: KEY.cls, KEY.json and the video of every sample.

The tar's bytes depend on its entries alone: members in webdataset's order, time 0, a fixed owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.encode import Outcome
from data_prep.journal import ShardRecord, Staging, read_record, record_url
from data_prep.settings import PrepSettings
from data_prep.sources.items import Item
from vswin_dist import local_files, storage
from vswin_dist.errors import StorageError, WorkFailed
from vswin_dist.manifest import Reject, Sample, Shard

BLOCK = 512


def sample_key(source_id: str) -> str:
    """Make a readable name without dots, unique for every source id: WebDataset cuts keys at the first dot."""
    stem = re.sub(r"\.\w{2,4}$", "", source_id)
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[-48:]
    return f"{slug or 'video'}-{hashlib.sha256(source_id.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Entry:
    """One position of the dataset's order, as it goes into a shard or its record."""

    position: int
    index: int  # under which its bytes are staged
    item: Item
    class_id: int
    outcome: Outcome
    as_is: bool  # its bytes are packed as they are, from the source where it is a file

    @property
    def source_url(self) -> str:
        """Where the bytes to pack lie in the source, "" where they are staged."""
        return self.item.url if self.as_is else ""

    def reject(self) -> Reject:
        """Say in the manifest's form why it is not kept."""
        return Reject(self.item.source_id, self.item.class_name, self.outcome.verdict, self.outcome.detail)


@dataclass(frozen=True)
class PackTask:
    """All that is needed to write one shard, on any node."""

    number: int
    start: int  # positions [start, end) of the order
    end: int
    entries: list[Entry]  # kept and rejected, in order
    out: str
    staging: str
    keep_indices: bool  # the record must say which indices it covers


def tar_bytes(outcome: Outcome) -> int:
    """Count the bytes that a sample takes in a tar: three headers, class, description and the video, each in blocks."""
    return 3 * BLOCK + 2 * BLOCK + -(-outcome.size // BLOCK) * BLOCK


def is_full(count: int, size: int, following: Outcome, settings: PrepSettings) -> bool:
    """Say whether a shard of `count` samples and `size` bytes is to be closed before the `following` sample."""
    return count > 0 and (count >= settings.shard_count or size + tar_bytes(following) > settings.shard_bytes)


def cut_into_shards(kept: list[Entry], settings: PrepSettings) -> list[list[Entry]]:
    """Cut into consecutive groups of entries, one for each shard."""
    groups: list[list[Entry]] = []
    size = 0
    for entry in kept:
        if not groups or is_full(len(groups[-1]), size, entry.outcome, settings):
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += tar_bytes(entry.outcome)
    return groups


def shard_name(number: int) -> str:
    """Name the file of shard `number`."""
    return f"shard-{number:05d}.tar"


def pack(task: PackTask) -> ShardRecord:
    """Write the tar (where any entry is kept), then its record; the staged bytes are removed last.

    Raises:
        WorkFailed: bytes changed since they were verified. StorageError: the storage fails.
    """
    staging = Staging(task.staging)
    with contextlib.suppress(FileNotFoundError):  # a worker that died before it could say so has done it already
        record = read_record(task.out, task.start)
        staging.discard(e.index for e in task.entries)
        return record
    kept = [e for e in task.entries if e.outcome.kept]
    rejected = [e.reject() for e in task.entries if not e.outcome.kept]
    shard, samples = write_shard(kept, task.number, task.out, staging, shard_name(task.number)) if kept else (None, [])
    contents = [e.outcome.content for e in kept]
    record = ShardRecord(
        task.number,
        task.start,
        task.end,
        shard,
        samples,
        contents,
        rejected,
        [e.index for e in task.entries] if task.keep_indices else [],
        notes_of(kept),
    )
    storage.put_bytes(record_url(task.out, task.start), record.to_json())
    staging.discard(e.index for e in task.entries)
    return record


def notes_of(kept: list[Entry]) -> list[str]:
    """Say what people should know of kept videos."""
    return [f"{e.item.source_id} {e.outcome.detail}" for e in kept if e.outcome.detail]


def write_shard(
    kept: list[Entry], number: int, out: str, staging: Staging, name: str, sha256: str = ""
) -> tuple[Shard, list[Sample]]:
    """Write and publish the tar `name` of `kept`; the samples' `shard` is `number`.

    Raises:
        WorkFailed: `sha256` is given and the tar has another; nothing is published then.
    """
    samples: list[Sample] = []
    with _published(storage.join(out, name), staging.url) as stream:
        for entry, data in ((e, _bytes_of(e, staging)) for e in kept):
            samples.append(_write_sample(stream, entry, data, number))
        stream.close_tar()
        if sha256 and stream.digest.hexdigest() != sha256:
            raise WorkFailed(f"{name} rebuilt has sha256 {stream.digest.hexdigest()}, the manifest says {sha256}")
    return Shard(name, stream.count, stream.digest.hexdigest(), len(kept)), samples


def _bytes_of(entry: Entry, staging: Staging) -> bytes:
    """Read the bytes to pack. What is not there any more as it was verified loses its verdict: the next run verifies it.

    Raises:
        WorkFailed: it is not. StorageError: the storage fails.
    """
    try:
        if not entry.source_url:
            data = staging.payload(entry.index)
        elif storage.is_local(entry.source_url):
            data = Path(storage.absolute(entry.source_url)).read_bytes()  # small files by the hundred thousand
        else:
            data = storage.read_bytes(entry.source_url)
        changed = len(data) != entry.outcome.size or zlib.crc32(data) != entry.outcome.crc32
        problem = "changed since it was verified" if changed else ""
    except (OSError, StorageError) as error:
        if isinstance(error, StorageError) and error.retriable:
            raise
        problem = f"cannot be read any more since it was verified ({error})"
    if problem:
        staging.discard([entry.index])
        where = entry.source_url or "its staged copy"
        raise WorkFailed(f"{entry.item.source_id}: {where} {problem}. Run the same command again, which verifies it anew.")
    return data


class _TarStream:
    """Counts and hashes what webdataset's TarWriter writes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        from webdataset.writer import TarWriter  # heavy: imported where a tar is written

        self.file = file
        self.count = 0
        self.digest = hashlib.sha256()
        self.tar: Any = TarWriter(self, encoder=False, mtime=0, user="root", group="root")

    def write(self, data: bytes) -> int:
        """Take what tarfile writes; after the file is closed, that is the rest of a shard that was given up."""
        if self.file.closed:
            return len(data)
        self.file.write(data)
        self.digest.update(data)
        self.count += len(data)
        return len(data)

    def close_tar(self) -> None:
        """Write the tar's end."""
        self.tar.close()


def _write_sample(stream: _TarStream, entry: Entry, data: bytes, number: int) -> Sample:
    o = entry.outcome
    key = sample_key(entry.item.source_id)
    facts = {
        "source_id": entry.item.source_id,
        "label": entry.item.class_name,
        "class_id": entry.class_id,
        "frames": o.frames,
        "fps": o.fps,
        "duration": o.duration,
        "width": o.width,
        "height": o.height,
    }
    members = {
        "cls": str(entry.class_id).encode(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
        o.extension: data,
    }
    offset = stream.tar.tarstream.offset
    for extension in sorted(members):  # the order in which TarWriter writes them
        offset += BLOCK
        if extension == o.extension:
            break
        offset += -(-len(members[extension]) // BLOCK) * BLOCK
    stream.tar.write({"__key__": key, **members})
    stream.tar.tarstream.members.clear()  # tarfile would remember every member
    return Sample(
        key,
        entry.class_id,
        number,
        offset,
        o.size,
        o.crc32,
        o.extension,
        o.frames,
        o.fps,
        o.duration,
        o.width,
        o.height,
        entry.item.source_id,
    )


@contextlib.contextmanager
def _published(url: str, staging: str) -> Iterator[_TarStream]:
    """Yield a tar that appears at `url` whole, or not at all. Local: written beside its target. Remote: spooled."""
    if storage.is_local(url):
        with local_files.write_atomically(storage.absolute(url)) as temporary, open(temporary, "wb") as file:
            yield _TarStream(file)
    else:
        with _spool(staging) as temporary:
            with open(temporary, "wb") as file:
                yield _TarStream(file)
            storage.put_file(temporary, url)


@contextlib.contextmanager
def _spool(staging: str) -> Iterator[Path]:
    """Yield a temporary file, in the staging folder where that is local: the next run removes it if this one is killed."""
    folder = Path(storage.absolute(staging) if storage.is_local(staging) else tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    spool = folder / f".data-prep-{uuid.uuid4().hex}.tmp"
    try:
        yield spool
    finally:
        spool.unlink(missing_ok=True)
