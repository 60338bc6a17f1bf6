"""What a manifest holds, its fingerprint, and what would contradict it."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from vswin_dist import storage
from vswin_dist.columns import BLOCK, Int32, Table, UInt32
from vswin_dist.errors import DataError

FILE_NAME = "manifest.json"
# How colours are kept and read. 1: as before manifests said so; videos that were encoded may have the pixels of BT.601 under
# another tag, and planes of RGB, palettes and grey are made as they were then. 2: all as tagged.
COLOURS = 2
SAMPLINGS = ("dense", "uniform")  # how clips are taken from the videos of a set; see vswin_dist.data.sampling


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: `url` relative to the manifest (or absolute), its bytes, sha256 and number of samples."""

    url: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One kept video. `offset` and `size` place the bytes of its video member within shard number `shard`."""

    key: str
    class_id: Int32
    shard: Int32
    offset: int  # bytes from the start of the tar to the member's data
    size: int  # bytes of the member's data
    crc32: UInt32  # zlib.crc32 of those bytes
    extension: str  # of the member, without a dot: mp4, webm, ...
    frames: Int32
    fps: float
    duration: float  # seconds
    width: Int32  # pixels as displayed (rotation applied)
    height: Int32
    source_id: str  # what the source calls it: a relative path or an id


@dataclass(frozen=True, slots=True)
class Reject:
    """One video that was read and not kept, and why."""

    source_id: str
    class_name: str
    reason: str  # one of data_prep's verdicts, such as "truncated"
    detail: str


TABLES: dict[str, type[Any]] = {"shards": Shard, "samples": Sample, "rejected": Reject}


@dataclass(frozen=True)
class Manifest:
    """What a dataset of shards holds. See the module's docstring for the files. Plain rows are made into tables."""

    name: str
    split: str
    classes: list[str]  # class id -> name
    encoding: dict[str, Any]  # settings that the videos were encoded with
    shards: Table[Shard]
    samples: Table[Sample]
    rejected: Table[Reject] = field(default_factory=lambda: Table.of(Reject, ()))
    read: int = 0  # videos read = kept + rejected
    sampling: str = "dense"  # one of SAMPLINGS, the rule that the set is trained with; no part of the fingerprint
    colours: int = COLOURS  # see there; no part of the fingerprint, the encoding's own is

    def __post_init__(self) -> None:
        for name, cls in TABLES.items():
            if not isinstance(rows := getattr(self, name), Table):
                object.__setattr__(self, name, Table.of(cls, rows))

    @property
    def counts(self) -> dict[str, Any]:
        """read, kept, rejected, and the rejected by reason."""
        return {
            "read": self.read,
            "kept": len(self.samples),
            "rejected": len(self.rejected),
            "reasons": dict(sorted(self.rejected.counts("reason").items())),
        }

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over names, hashes, samples, classes and encoding; no URL, no time."""
        digest = hashlib.sha256(self._header())
        for block in self.samples.blocks():
            columns = (block[name].tolist() for name in ("key", "class_id", "shard", "offset", "size", "crc32"))
            digest.update("".join(map("\n%s\t%d\t%d\t%d\t%d\t%d".__mod__, zip(*columns, strict=True))).encode())
        return digest.hexdigest()[:32]

    def seal(self, sha256: str) -> str:
        """32 hex digits over the fingerprint and all that it is over, the samples by the `sha256` of their file."""
        return hashlib.sha256(b"\n".join((self.fingerprint.encode(), sha256.encode(), self._header()))).hexdigest()[:32]

    def _header(self) -> bytes:
        """Give what the fingerprint is over beside the samples."""
        shards = [[s.url.rsplit("/", 1)[-1], s.bytes, s.sha256, s.samples] for s in self.shards]
        return json.dumps([self.classes, self.encoding, shards], sort_keys=True, ensure_ascii=False).encode()

    def check(self, url: str) -> None:
        """Raise DataError where counts, keys, classes or shard numbers contradict each other, or a video is empty."""
        if self.read != len(self.samples) + len(self.rejected):
            raise DataError(f"{url}: read {self.read} is not kept {len(self.samples)} + rejected {len(self.rejected)}")
        if self.sampling not in SAMPLINGS:
            raise DataError(f"{url}: sampling {self.sampling!r} is none of {', '.join(SAMPLINGS)}")
        if not 1 <= self.colours <= COLOURS:
            raise DataError(f"{url}: colours {self.colours} are not known here, 1 to {COLOURS} are: install a newer version")
        self._check_keys(url)
        numbers, listed = np.unique(self.samples.numbers("shard"), return_counts=True)
        per_shard = dict(zip(numbers.tolist(), listed.tolist(), strict=True))
        for number, shard in enumerate(self.shards):
            found = per_shard.pop(number, 0)
            if found != shard.samples:
                raise DataError(f"{url}: shard {shard.url} says {shard.samples} samples, {found} are listed")
        if per_shard:
            raise DataError(f"{url}: samples name shard {min(per_shard)}, there are {len(self.shards)}")
        ids = self.samples.numbers("class_id")
        if len(bad := np.flatnonzero((ids < 0) | (ids >= len(self.classes)))):
            first = self.samples[bad.item(0)]
            raise DataError(f"{url}: {first.key!r} has class id {first.class_id}, there are {len(self.classes)} classes")
        hollow = np.flatnonzero((self.samples.numbers("frames") < 1) | (self.samples.numbers("size") < 1))
        empty = [f"{s.source_id!r} with {s.frames} frames, {s.size} bytes" for s in self.samples[hollow[:1]]]
        empty += [f"shard {s.url} with {s.bytes} bytes" for s in self.shards if s.bytes < 1]
        if empty:
            count = max(len(hollow), len(empty))
            raise DataError(f"{url}: {count} without content: {empty[0]}. Remove the dataset and shard it again.")

    def _check_keys(self, url: str) -> None:
        """Refuse keys with dots, and the same key twice, found by its hash: ten million keys are a gigabyte as a set."""
        hashes = np.empty(len(self.samples), dtype=np.int64)
        for number, block in enumerate(self.samples.blocks()):
            keys = block["key"].tolist()
            if dotted := [k for k in keys if "." in k]:
                raise DataError(f"{url}: key {dotted[0]!r} has a dot, which WebDataset would cut it at")
            hashes[number * BLOCK :][: len(keys)] = np.fromiter(map(hash, keys), np.int64, len(keys))
        ordered = np.sort(hashes)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        suspects = Counter(self.samples.value("key", i) for i in np.flatnonzero(np.isin(hashes, repeated)).tolist())
        if twice := [k for k, n in suspects.items() if n > 1]:
            raise DataError(f"{url}: {len(twice)} keys stand twice, for instance {twice[0]!r}")


def manifest_url(url: str) -> str:
    """Return the manifest's URL, given itself or the folder that holds it."""
    return url if url.endswith(".json") else storage.join(url, FILE_NAME)


def shard_url(base: str, shard: Shard) -> str:
    """Return the absolute URL of `shard`, `base` being the manifest's URL or folder."""
    folder = manifest_url(storage.absolute(base)).rsplit("/", 1)[0]
    return storage.join(folder, shard.url)


def nfc(name: str) -> str:
    """Give the composed form of `name` (Unicode's NFC), in which names are compared: a Mac writes letters apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def check_same_classes(train: Sequence[str], other: Sequence[str], what: str) -> None:
    """Refuse a dataset whose class list differs from training's.

    Raises:
        DataError: names the first difference.
    """
    train, other = ([nfc(name) for name in names] for names in (train, other))
    if train == other:
        return
    if len(train) != len(other):
        detail = f"{len(train)} classes against {len(other)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(train, other, strict=True)) if a != b)
        detail = f"class {i} is {train[i]!r} against {other[i]!r}"
    raise DataError(
        f"{what} has other classes than the training set: {detail}. "
        "Shard it with --classes MANIFEST, naming the training set's manifest."
    )


def check_shard_sizes(manifest: Manifest, base: str) -> None:
    """Compare every shard's length in the storage with the manifest's, before anything is started.

    Raises:
        DataError: a shard is absent or of another length (cut short).
    """
    for shard in manifest.shards:
        url = shard_url(base, shard)
        try:
            found = storage.size(url)
        except FileNotFoundError as error:
            raise DataError(f"shard {url} is absent; the manifest expects {shard.bytes} bytes") from error
        if found != shard.bytes:
            raise DataError(
                f"shard {url} has {found} bytes, the manifest says {shard.bytes}: it was cut short or "
                "replaced. Run data-prep verify, and shard again."
            )
