"""The shard manifest: the contract between data_prep, which writes it, and training, which reads by it.

One JSON file, ``manifest.json``, beside the shards. Samples are stored by column, so that a Kinetics of 240,000
videos stays a small file that parses in seconds. Shard URLs are relative to the manifest unless absolute.
The fingerprint names the content (shard names, hashes, samples, classes, encoding) and holds no place and no time:
the same set on disk and on S3 has the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vswin_dist import storage
from vswin_dist.errors import DataError

FORMAT = "vswin-manifest"
VERSION = 1
FILE_NAME = "manifest.json"
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
    class_id: int
    shard: int
    offset: int  # bytes from the start of the tar to the member's data
    size: int  # bytes of the member's data
    crc32: int  # zlib.crc32 of those bytes
    extension: str  # of the member, without a dot: mp4, webm, ...
    frames: int
    fps: float
    duration: float  # seconds
    width: int  # pixels as displayed (rotation applied)
    height: int
    source_id: str  # what the source calls it: a relative path or an id


@dataclass(frozen=True, slots=True)
class Reject:
    """One video that was read and not kept, and why."""

    source_id: str
    class_name: str
    reason: str  # one of data_prep's verdicts, such as "truncated"
    detail: str


@dataclass(frozen=True)
class Manifest:
    """What a dataset of shards holds. See the module's docstring for the file."""

    name: str
    split: str
    classes: list[str]  # class id -> name
    encoding: dict[str, Any]  # settings that the videos were encoded with
    shards: list[Shard]
    samples: list[Sample]
    rejected: list[Reject] = field(default_factory=list)
    read: int = 0  # videos read = kept + rejected
    sampling: str = "dense"  # one of SAMPLINGS, the rule that the set is trained with; no part of the fingerprint

    @property
    def counts(self) -> dict[str, Any]:
        """read, kept, rejected, and the rejected by reason."""
        reasons = Counter(r.reason for r in self.rejected)
        return {"read": self.read, "kept": len(self.samples), "rejected": len(self.rejected),
                "reasons": dict(sorted(reasons.items()))}

    @property
    def fingerprint(self) -> str:
        """32 hex digits over names, hashes, samples, classes and encoding; no URL, no time."""
        digest = hashlib.sha256()
        header = [self.classes, self.encoding,
                  [[s.url.rsplit("/", 1)[-1], s.bytes, s.sha256, s.samples] for s in self.shards]]
        digest.update(json.dumps(header, sort_keys=True, ensure_ascii=False).encode())
        for s in self.samples:
            digest.update(f"\n{s.key}\t{s.class_id}\t{s.shard}\t{s.offset}\t{s.size}\t{s.crc32}".encode())
        return digest.hexdigest()[:32]

    def to_json(self) -> bytes:
        """The file's bytes: the same manifest gives the same bytes."""
        names = list(Sample.__dataclass_fields__)
        columns = {name: [getattr(s, name) for s in self.samples] for name in names}
        body = {
            "format": FORMAT, "version": VERSION, "name": self.name, "split": self.split,
            "fingerprint": self.fingerprint, "counts": self.counts, "encoding": self.encoding,
            "classes": self.classes, "sampling": self.sampling, "shards": [asdict(s) for s in self.shards],
            "rejected": [asdict(r) for r in self.rejected], "samples": columns,
        }
        return (json.dumps(body, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, url: str) -> Manifest:
        """Parse and check a manifest's bytes; `url` is named in errors.

        Raises:
            DataError: not a manifest, of an unknown version, or its parts contradict each other.
        """
        try:
            body = json.loads(data)
            if body.get("format") != FORMAT or body.get("version") != VERSION:
                raise DataError(f"{url} is no manifest that this version reads: format {body.get('format')!r}, version "
                                f"{body.get('version')!r}; expected {FORMAT!r}, {VERSION}")
            columns = body["samples"]
            rows = zip(*(columns[name] for name in Sample.__dataclass_fields__), strict=True)
            manifest = Manifest(
                name=body["name"], split=body["split"], classes=body["classes"], encoding=body["encoding"],
                shards=[Shard(**s) for s in body["shards"]], samples=[Sample(*row) for row in rows],
                rejected=[Reject(**r) for r in body["rejected"]], read=body["counts"]["read"],
                sampling=body.get("sampling", "dense"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{url} is not a readable manifest: {type(error).__name__}: {error}") from error
        manifest.check(url)
        if manifest.fingerprint != body["fingerprint"]:
            raise DataError(f"{url} was changed by hand: it says fingerprint {body['fingerprint']}, "
                            f"its content has {manifest.fingerprint}")
        return manifest

    def check(self, url: str) -> None:
        """Raise DataError where counts, keys, classes or shard numbers contradict each other."""
        if self.read != len(self.samples) + len(self.rejected):
            raise DataError(f"{url}: read {self.read} is not kept {len(self.samples)} + rejected {len(self.rejected)}")
        if self.sampling not in SAMPLINGS:
            raise DataError(f"{url}: sampling {self.sampling!r} is none of {', '.join(SAMPLINGS)}")
        keys = Counter(s.key for s in self.samples)
        if twice := [k for k, n in keys.items() if n > 1]:
            raise DataError(f"{url}: {len(twice)} keys stand twice, for instance {twice[0]!r}")
        if dotted := [k for k in keys if "." in k]:
            raise DataError(f"{url}: key {dotted[0]!r} has a dot, which WebDataset would cut it at")
        per_shard = Counter(s.shard for s in self.samples)
        for number, shard in enumerate(self.shards):
            if per_shard.pop(number, 0) != shard.samples:
                raise DataError(f"{url}: shard {shard.url} says {shard.samples} samples, "
                                f"{sum(s.shard == number for s in self.samples)} are listed")
        if per_shard:
            raise DataError(f"{url}: samples name shard {min(per_shard)}, there are {len(self.shards)}")
        if bad := [s for s in self.samples if not 0 <= s.class_id < len(self.classes)]:
            raise DataError(f"{url}: {bad[0].key!r} has class id {bad[0].class_id}, there are {len(self.classes)} classes")


def manifest_url(url: str) -> str:
    """The manifest's URL, given itself or the folder that holds it."""
    return url if url.endswith(".json") else storage.join(url, FILE_NAME)


def read_manifest(url: str) -> Manifest:
    """Read the manifest at `url` (the file or its folder).

    Raises:
        DataError: absent, damaged, or contradicting itself.
    """
    target = manifest_url(storage.absolute(url))
    try:
        return Manifest.from_json(storage.read_bytes(target), target)
    except FileNotFoundError as error:
        raise DataError(f"no shards at {url}: {target} does not exist. Make them with data-prep shard.") from error


def write_manifest(manifest: Manifest, url: str) -> str:
    """Check `manifest` and put it atomically at `url` (the file or its folder); returns the file's URL."""
    target = manifest_url(storage.absolute(url))
    manifest.check(target)
    storage.put_bytes(target, manifest.to_json())
    return target


def shard_url(base: str, shard: Shard) -> str:
    """The absolute URL of `shard`, `base` being the manifest's URL or folder."""
    folder = manifest_url(storage.absolute(base)).rsplit("/", 1)[0]
    return storage.join(folder, shard.url)


def check_same_classes(train: Sequence[str], other: Sequence[str], what: str) -> None:
    """Refuse a dataset whose class list differs from training's.

    Raises:
        DataError: names the first difference.
    """
    if list(train) == list(other):
        return
    if len(train) != len(other):
        detail = f"{len(train)} classes against {len(other)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(train, other, strict=True)) if a != b)
        detail = f"class {i} is {train[i]!r} against {other[i]!r}"
    raise DataError(f"{what} has other classes than the training set: {detail}. "
                    "Shard it with --classes MANIFEST, naming the training set's manifest.")


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
            raise DataError(f"shard {url} has {found} bytes, the manifest says {shard.bytes}: it was cut short or "
                            "replaced. Run data-prep verify, and shard again.")
