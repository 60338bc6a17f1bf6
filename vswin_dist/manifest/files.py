"""The files of a manifest: written, read, and shared by the processes of a node."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vswin_dist import node_cache, parquet, storage
from vswin_dist.columns import Builder, Table, arrays_of, block_of, table_of
from vswin_dist.errors import DataError
from vswin_dist.manifest.contents import COLOURS, SAMPLINGS, TABLES, Manifest, Reject, Sample, Shard, manifest_url
from vswin_dist.node_cache import Arrays
from vswin_dist.records import parse_record

FORMAT = "vswin-manifest"
VERSION = 2
MADE_ANEW = "run the same data-prep shard command, then data-prep retry where that had added shards"


@dataclass(frozen=True, kw_only=True)
class _Head:
    """What stands in the JSON of every version: see `Manifest`."""

    name: str
    split: str
    fingerprint: str
    counts: dict[str, Any]
    encoding: dict[str, Any]
    classes: list[str]
    shards: list[Shard]
    sampling: str = "dense"  # as written before there was one
    colours: int = 1  # likewise


@dataclass(frozen=True, kw_only=True)
class _ColumnFile:
    """A Parquet file beside the JSON."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _File(_Head):
    """The JSON's object. `seal` ties the fingerprint to what it is over: see `Manifest.seal`."""

    samples: _ColumnFile
    rejected: _ColumnFile
    seal: str


@dataclass(frozen=True, kw_only=True)
class _FileOfVersion1(_Head):
    """The JSON's object where it holds everything; the samples by column."""

    samples: dict[str, list[Any]]
    rejected: list[Reject]


def read_manifest(url: str) -> Manifest:
    """Read the manifest at `url` (the file or its folder).

    Raises:
        DataError: absent, damaged, or contradicting itself.
        StorageError: it cannot be read.
    """
    target = manifest_url(storage.absolute(url))
    try:
        data = storage.read_bytes(target)
    except FileNotFoundError as error:
        raise DataError(f"no shards at {url}: {target} does not exist. Make them with data-prep shard.") from error
    digest = hashlib.sha256(data).hexdigest()[:32]
    return _manifest(node_cache.shared(f"manifests/{digest}", lambda: _convert(data, target)), target, digest)


def write_manifest(manifest: Manifest, url: str) -> str:
    """Check `manifest` and put it at `url` (the file or its folder), the JSON last and atomically; returns its URL."""
    target = manifest_url(storage.absolute(url))
    manifest.check(target)
    replaced = _column_files(target)
    files = {name: _put_columns(getattr(manifest, name), name, target) for name in ("samples", "rejected")}
    body = {
        "format": FORMAT,
        "version": VERSION,
        "name": manifest.name,
        "split": manifest.split,
        "fingerprint": manifest.fingerprint,
        "counts": manifest.counts,
        "encoding": manifest.encoding,
        "classes": manifest.classes,
        "sampling": manifest.sampling,
        "colours": manifest.colours,
        "shards": [asdict(s) for s in manifest.shards],
        **{name: asdict(file) for name, file in files.items()},
        "seal": manifest.seal(files["samples"].sha256),
    }
    storage.put_bytes(target, (json.dumps(body, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n").encode())
    for name in replaced.difference(file.file for file in files.values()):
        storage.remove(_beside(target, name))
    return target


def _beside(target: str, name: str) -> str:
    return storage.join(target.rsplit("/", 1)[0], name)


def _column_files(target: str) -> set[str]:
    """Name the column files of the manifest that stands at `target`, if one does."""
    try:
        body = json.loads(storage.read_bytes(target))
        return {body[name]["file"] for name in ("samples", "rejected")}
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # none, or of version 1
        return set()


def _put_columns(table: Table[Any], name: str, target: str) -> _ColumnFile:
    """Put the column file of `table` beside `target`, named by its content: the one of an earlier manifest stays whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        parquet.write(table, path)
        size, sha256 = parquet.size_and_sha256(path)
        stem = target.rsplit("/", 1)[-1].removesuffix(".json")
        file = f"{stem}.{name}.{sha256[:12]}.parquet"
        storage.put_file(path, _beside(target, file))
    return _ColumnFile(file=file, rows=len(table), bytes=size, sha256=sha256)


def _convert(data: bytes, url: str) -> Arrays:
    """Read what the JSON `data` of `url` says and names, checked, into arrays that a node's processes share."""
    try:
        version = json.loads(data).get("version")
    except (ValueError, AttributeError):
        version = None  # which `_of_files` refuses
    manifest = _of_version_1(data, url) if version == 1 else _of_files(data, url)
    head = {
        name: getattr(manifest, name)
        for name in ("name", "split", "classes", "encoding", "read", "sampling", "colours", "fingerprint")
    }
    arrays = {n: a for table in TABLES for n, a in arrays_of(getattr(manifest, table), f"{table}.").items()}
    return Arrays(arrays, {"head": json.dumps(head)})


def _of_files(data: bytes, url: str) -> Manifest:
    body = parse_record(data, url, _File, format=FORMAT, version=VERSION, what="manifest")
    manifest = _of_head(body, _read_columns(url, body.samples, Sample), _read_columns(url, body.rejected, Reject), url)
    vars(manifest)["fingerprint"] = body.fingerprint
    if manifest.seal(body.samples.sha256) != body.seal:
        raise DataError(
            f"{url} was changed by hand: its classes, encoding, shards or samples are not those of fingerprint "
            f"{body.fingerprint}. Restore it, or remove it and {MADE_ANEW}"
        )
    known = manifest.sampling in SAMPLINGS and 1 <= manifest.colours <= COLOURS
    if manifest.read != len(manifest.samples) + len(manifest.rejected) or not known:
        manifest.check(url)
    return manifest


def _of_version_1(data: bytes, url: str) -> Manifest:
    body = parse_record(data, url, _FileOfVersion1, format=FORMAT, version=1, what="manifest")
    builder = Builder(Sample)
    try:
        builder.add(block_of(Sample, body.samples))
    except KeyError as error:
        raise DataError(f"{url} is not a valid manifest: {error} is missing") from error
    except ValueError as error:
        raise DataError(f"{url} is not a valid manifest: {error}") from error
    manifest = _of_head(body, builder.table(), Table.of(Reject, body.rejected), url)
    manifest.check(url)
    if manifest.fingerprint != body.fingerprint:
        raise DataError(
            f"{url} was changed by hand: it says fingerprint {body.fingerprint}, its content has {manifest.fingerprint}"
        )
    return manifest


def _of_head(body: _Head, samples: Table[Sample], rejected: Table[Reject], url: str) -> Manifest:
    try:
        read = int(body.counts["read"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{url} is not a valid manifest: counts does not say how many videos were read") from error
    shards = Table.of(Shard, body.shards)
    said = (body.name, body.split, body.classes, body.encoding)
    return Manifest(*said, shards, samples, rejected, read, body.sampling, body.colours)


def _read_columns(url: str, said: _ColumnFile, cls: type[Any]) -> Table[Any]:
    """Read a column file of the manifest at `url`, which must be what the manifest says.

    Raises:
        DataError: absent, cut short, damaged, or not such columns.
    """
    place = _beside(url, said.file)
    remedy = f"Copy it again from where the dataset was made, or remove the manifest and {MADE_ANEW}"
    try:
        with storage.local_copy(place) as path:
            found = parquet.size_and_sha256(path)
            if found != (said.bytes, said.sha256):
                raise DataError(
                    f"{place} has {found[0]} bytes with sha256 {found[1][:12]}, {url} says {said.bytes} with "
                    f"{said.sha256[:12]}: it was cut short, damaged or replaced. {remedy}"
                )
            table = parquet.read(path, cls)
    except FileNotFoundError as error:
        raise DataError(f"{place} does not exist, and {url} names it: it holds part of the dataset. {remedy}") from error
    except ValueError as error:
        raise DataError(f"{place} is not a valid column file: {error}") from error
    if len(table) != said.rows:
        raise DataError(f"{place} has {len(table)} rows, {url} says {said.rows}. {remedy}")
    return table


def _manifest(content: Arrays, url: str, digest: str) -> Manifest:
    """Make the manifest of what `_convert` gave; to other processes its tables go as references."""
    parts: dict[str, Any] = json.loads(content.texts["head"])
    fingerprint = parts.pop("fingerprint")
    for name, cls in TABLES.items():
        parts[name] = table_of(cls, content.arrays, f"{name}.", origin=(_table, (url, digest, name)))
    manifest = Manifest(**parts)
    vars(manifest)["fingerprint"] = fingerprint
    return manifest


def _table(url: str, digest: str, name: str) -> Table[Any]:
    """Give a table of the manifest that another process has read at `url`."""
    table: Table[Any] = getattr(_known(url, digest), name)
    return table


@lru_cache(maxsize=4)
def _known(url: str, digest: str) -> Manifest:
    """Give the manifest whose JSON has this `digest`: from the node's copy, without the storage, where there is one.

    Raises:
        DataError: there is none, and at `url` is another by now.
    """

    def convert() -> Arrays:
        data = storage.read_bytes(url)
        if hashlib.sha256(data).hexdigest()[:32] != digest:
            raise DataError(f"{url} was replaced while it was in use. Start again")
        return _convert(data, url)

    return _manifest(node_cache.shared(f"manifests/{digest}", convert), url, digest)
