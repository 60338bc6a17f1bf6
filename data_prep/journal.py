"""What is finished, kept so that any later run can resume: the specification, one record per shard, and the staged samples.

Below the output, in `.data-prep/`:

    plan.json            the specification: source, settings, classes and a digest of the order; another is refused here
    parts/00003.json     what archive 3 holds, written when it was read to its end
    records/00000042.json  written after the shard that begins at position 42 of the order was published
    lock, lease/         who writes there
Below the staging folder (beside the journal, or on this machine where the output is remote):
    00000042             the outcome of the video of index 42: one line of JSON, then the bytes to pack

Every file appears atomically, so a run that was killed at any moment leaves only whole ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_prep.encode import Outcome
from vswin_dist import lease, local_files, records, storage
from vswin_dist.errors import DataError
from vswin_dist.lease import UNFENCED, Fence
from vswin_dist.manifest import FILE_NAME, Reject, Sample, Shard
from vswin_dist.records import KEY

FOLDER = ".data-prep"


def folder(out: str) -> str:
    """Give the URL of the journal's folder of the output `out`."""
    return storage.join(out, FOLDER)


def record_url(out: str, start: int) -> str:
    """Give the URL of the record of the shard beginning at position `start`."""
    return storage.join(folder(out), "records", f"{start:08d}.json")


@dataclass(frozen=True)
class ShardRecord:
    """A finished range [start, end) of the order: its shard (None where nothing of it was kept) and its rejects."""

    number: int
    start: int
    end: int
    shard: Shard | None
    samples: list[Sample]
    contents: list[str]  # hash of what each sample was made from, for finding duplicates
    rejected: list[Reject]
    # of the videos at these positions, where they come from archives; else empty
    indices: list[int] = field(metadata={KEY: "slots"})
    notes: list[str] = field(default_factory=list)  # what people should know of its samples

    def to_json(self) -> bytes:
        """Make the file's bytes."""
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        body["shard"] = self.shard and asdict(self.shard)
        for name, cls in (("samples", Sample), ("rejected", Reject)):  # by the thousand, and `asdict` copies every value
            columns = [f.name for f in fields(cls)]
            body[name] = [{column: getattr(row, column) for column in columns} for row in body[name]]
        body["slots"] = body.pop("indices")
        if not self.notes:
            del body["notes"]
        return json.dumps(body, ensure_ascii=False).encode()


@dataclass(frozen=True)
class ShardRange:
    """Which part of the order a record covers: positions [start, end), and the indices of the videos there."""

    start: int
    end: int
    number: int  # of the record
    covered: Sequence[int]  # small: a range, or an array


def read_record(out: str, start: int) -> ShardRecord:
    """Read the record of the shard beginning at position `start`.

    Raises:
        FileNotFoundError: it is absent.
        DataError: it is damaged.
    """
    return records.read_record(record_url(out, start), ShardRecord, what="record of a shard")


def read_ranges(out: str) -> dict[int, ShardRange]:
    """Read what the records of the output cover, by start. The records themselves would be large all at once."""
    names = [n for n in storage.list_names(storage.join(folder(out), "records")) if n.endswith(".json")]
    found = (read_record(out, int(name.removesuffix(".json"))) for name in names if not name.startswith("."))
    return {r.start: ShardRange(r.start, r.end, r.number, array("i", r.indices) or range(r.start, r.end)) for r in found}


def read_specification(out: str) -> dict[str, Any] | None:
    """Read the specification of the output, None where there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        specification: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder(out), "plan.json")))
        return specification
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{folder(out)}/plan.json is damaged: {error}. Remove the output and start anew.") from error


def check_specification(out: str, specification: dict[str, Any]) -> bool:
    """Say whether the output holds `specification` already (True) or is free (False); nothing is written.

    Raises:
        DataError: the output holds another dataset, or the same one with other settings.
    """
    old = read_specification(out)
    if old is None:
        foreign = [n for n in storage.list_names(out) if n == FILE_NAME or n.endswith(".tar")]
        if foreign:
            raise DataError(
                f"{out} already holds {foreign[0]!r}, which no data-prep journal there accounts for; "
                "choose another output or remove it"
            )
        return False
    if changes := _differences(old, specification):
        raise DataError(
            f"{out} already holds a different dataset: {'; '.join(changes)}. Choose another output, or remove this one."
        )
    return True


def write_specification(out: str, specification: dict[str, Any]) -> None:
    """Begin `specification` in the output."""
    storage.put_bytes(storage.join(folder(out), "plan.json"), json.dumps(specification, ensure_ascii=False).encode())


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    flat_old, flat_new = (dict(_flatten(p["settings"])) for p in (old, new))
    flat_old.setdefault("sampling", "dense")  # specifications from before there was a choice
    changes = [
        f"{name} was {flat_old.get(name)!r}, is now {flat_new.get(name)!r}"
        for name in sorted({*flat_old, *flat_new})
        if flat_old.get(name) != flat_new.get(name)
    ]
    if old["classes"] != new["classes"]:
        changes.append(f"the class list differs ({len(old['classes'])} classes then, {len(new['classes'])} now)")
    if old["archives"] != new["archives"]:
        changes.append(f"there are other archives ({len(old['archives'])} then, {len(new['archives'])} now)")
    if not changes and old["order"] != new["order"]:
        changes.append(f"the source lists other videos or classes ({old['videos']} videos then, {new['videos']} now)")
    return changes


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@dataclass(frozen=True)
class Part:
    """An archive that was read to its end: the ids of its videos in their order, and its members without a row."""

    ids: list[str]
    unlabelled: list[str] = field(metadata={KEY: "unnamed"})


def _part_url(out: str, number: int) -> str:
    return storage.join(folder(out), "parts", f"{number:05d}.json")


def read_part(out: str, number: int) -> Part | None:
    """Read what is known of archive `number`, None where it was not read to its end yet."""
    try:
        return records.read_record(_part_url(out, number), Part, what="record of an archive")
    except FileNotFoundError:
        return None


def write_part(out: str, number: int, part: Part) -> None:
    """Remember that archive `number` was read to its end."""
    body = {"ids": part.ids, "unnamed": part.unlabelled}
    storage.put_bytes(_part_url(out, number), json.dumps(body, ensure_ascii=False).encode())


class Staging:
    """Outcomes that wait for their shard, one file per video, named by its index (see `order`)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.local = storage.is_local(url)

    def _file(self, index: int) -> str:
        return storage.join(self.url, f"{index:08d}")

    def put(self, index: int, outcome: Outcome, payload: bytes) -> None:
        """Keep an outcome and the bytes to pack."""
        data = json.dumps({**outcome.as_dict(), "staged": len(payload)}, ensure_ascii=False).encode() + b"\n" + payload
        if not self.local:
            storage.put_bytes(self._file(index), data)
            return
        # no fsync: what a power cut leaves half is seen by its length and made again
        with local_files.write_atomically(self._file(index), durable=False) as temporary:
            temporary.write_bytes(data)

    def payload(self, index: int) -> bytes:
        """Read the bytes to pack. Raises FileNotFoundError."""
        file = self._file(index)
        return (Path(file).read_bytes() if self.local else storage.read_bytes(file)).partition(b"\n")[2]

    def outcomes(self) -> dict[int, Outcome]:
        """Read everything whole that is staged, by index. Half-written files of a killed run are removed."""
        found: dict[int, Outcome] = {}
        for name in storage.list_names(self.url):
            if not name.isdigit():
                if name.endswith(".tmp"):
                    storage.remove(storage.join(self.url, name))
                continue
            header, _, payload = storage.read_bytes(storage.join(self.url, name)).partition(b"\n")
            with contextlib.suppress(ValueError):
                values = json.loads(header)
                if values.pop("staged") == len(payload):
                    found[int(name)] = Outcome(**values)
        return found

    def discard(self, indices: Iterable[int]) -> None:
        """Remove outcomes whose shard is published."""
        for index in indices:
            if self.local:
                Path(self._file(index)).unlink(missing_ok=True)
            else:
                storage.remove(self._file(index))

    def clear(self) -> None:
        """Remove the whole folder."""
        storage.remove(self.url, recursive=True)


@contextlib.contextmanager
def only_writer(out: str) -> Iterator[Fence]:
    """Hold the output against a second run: on this machine by a lock, on object storage by a lease, which it yields.

    A run that was cut off there and comes back ends as soon as it looks at the lease, and before it writes a manifest;
    until then it writes what the other one writes, since the bytes of shards depend on the specification alone.

    Raises:
        DataError, PreflightError: another run holds it. FencedOut: another run has taken it over.
    """
    if not storage.is_local(out):
        remedy = "let it finish, or end it there; where it is dead, this command goes on once its lease has run out"
        with lease.held(storage.join(folder(out), lease.FOLDER), f"the output {out}", remedy) as fence:
            yield fence
        return
    path = Path(folder(out))
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another data-prep works on {out}") from error
        _remove_halves(path.parent)  # of a run that was killed
        yield UNFENCED
        _remove_halves(path.parent)  # of workers that were killed in this one


def _remove_halves(folder: Path) -> None:
    for root, _, files in os.walk(folder):  # a worker of a killed run may remove a folder now: `rglob` fails
        for name in fnmatch.filter(files, ".*.tmp"):
            Path(root, name).unlink(missing_ok=True)
