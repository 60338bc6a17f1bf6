"""What is finished, kept so that any later run can go on: the plan, one record per shard, and the staged samples.

Below the output, in ``.data-prep/``:

    plan.json            source, settings, classes and a digest of the order; another plan is refused here
    parts/00003.json     what archive 3 holds, written when it was read to its end
    records/00000042.json  written after the shard that begins at position 42 of the order was published
Below the staging folder (beside the journal, or on this machine where the output is remote):
    00000042             the outcome of slot 42: one line of JSON, then the bytes to pack

Every file appears atomically, so a run that was killed at any moment leaves only whole ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.encode import Outcome
from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.manifest import FILE_NAME, Reject, Sample, Shard

FOLDER = ".data-prep"


def folder(out: str) -> str:
    """The journal's folder of the output `out`."""
    return storage.join(out, FOLDER)


def record_url(out: str, start: int) -> str:
    """Where the record of the shard beginning at position `start` lies."""
    return storage.join(folder(out), "records", f"{start:08d}.json")


@dataclass(frozen=True)
class Record:
    """A finished stretch [start, end) of the order: its shard (None where nothing of it was kept) and its rejects."""

    number: int
    start: int
    end: int
    shard: Shard | None
    samples: list[Sample]
    contents: list[str]  # hash of what each sample was made from, for finding duplicates
    rejected: list[Reject]
    slots: list[int]  # of the positions, where they come from archives; else empty

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    @staticmethod
    def from_json(data: bytes) -> Record:
        """Parse what `to_json` made."""
        body = json.loads(data)
        body["shard"] = Shard(**body["shard"]) if body["shard"] else None
        body["samples"] = [Sample(**s) for s in body["samples"]]
        body["rejected"] = [Reject(**r) for r in body["rejected"]]
        return Record(**body)


@dataclass(frozen=True)
class Stretch:
    """Which part of the order a record covers; `slots` as in the record."""

    start: int
    end: int
    slots: list[int]


def read_record(out: str, start: int) -> Record:
    """The record of the shard beginning at position `start`."""
    return Record.from_json(storage.read_bytes(record_url(out, start)))


def read_stretches(out: str) -> dict[int, Stretch]:
    """What the records of the output cover, by start. The records themselves would be large all at once."""
    names = [n for n in storage.list_names(storage.join(folder(out), "records")) if n.endswith(".json")]
    records = (read_record(out, int(name.removesuffix(".json"))) for name in names if not name.startswith("."))
    return {record.start: Stretch(record.start, record.end, record.slots) for record in records}


def read_plan(out: str) -> dict[str, Any] | None:
    """The plan of the output, None where there is none."""
    try:
        plan: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder(out), "plan.json")))
        return plan
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{folder(out)}/plan.json is damaged: {error}. Remove the output and start anew.") from error


def check_plan(out: str, plan: dict[str, Any]) -> bool:
    """True where the output holds `plan` already, False where it is free; nothing is written.

    Raises:
        DataError: the output holds another dataset, or the same one with other settings.
    """
    old = read_plan(out)
    if old is None:
        foreign = [n for n in storage.list_names(out) if n == FILE_NAME or n.endswith(".tar")]
        if foreign:
            raise DataError(f"{out} already holds {foreign[0]!r}, which no data-prep journal there accounts for; "
                            "choose another output or remove it")
        return False
    if changes := _differences(old, plan):
        raise DataError(f"{out} already holds a different dataset: {'; '.join(changes)}. "
                        "Choose another output, or remove this one.")
    return True


def write_plan(out: str, plan: dict[str, Any]) -> None:
    """Begin `plan` in the output."""
    storage.put_bytes(storage.join(folder(out), "plan.json"), json.dumps(plan, ensure_ascii=False).encode())


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    flat_old, flat_new = (dict(_flatten(p["settings"])) for p in (old, new))
    flat_old.setdefault("sampling", "dense")  # plans from before there was a choice
    changes = [f"{name} was {flat_old.get(name)!r}, is now {flat_new.get(name)!r}"
               for name in sorted({*flat_old, *flat_new}) if flat_old.get(name) != flat_new.get(name)]
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
    unnamed: list[str]


def _part_url(out: str, number: int) -> str:
    return storage.join(folder(out), "parts", f"{number:05d}.json")


def read_part(out: str, number: int) -> Part | None:
    """What is known of archive `number`, None where it was not read to its end yet."""
    try:
        return Part(**json.loads(storage.read_bytes(_part_url(out, number))))
    except FileNotFoundError:
        return None


def write_part(out: str, number: int, part: Part) -> None:
    """Remember that archive `number` was read to its end."""
    storage.put_bytes(_part_url(out, number), json.dumps(asdict(part), ensure_ascii=False).encode())


class Staging:
    """Outcomes that wait for their shard, one file per slot (see `feed`)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.local = storage.is_local(url)

    def _place(self, slot: int) -> str:
        return storage.join(self.url, f"{slot:08d}")

    def put(self, slot: int, outcome: Outcome, payload: bytes) -> None:
        """Keep an outcome and the bytes to pack."""
        data = json.dumps({**outcome.as_dict(), "staged": len(payload)}, ensure_ascii=False).encode() + b"\n" + payload
        if not self.local:
            storage.put_bytes(self._place(slot), data)
            return
        target = Path(self._place(slot))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:  # no fsync: what a power cut leaves half is seen by its length and made again
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def payload(self, slot: int) -> bytes:
        """The bytes to pack. Raises FileNotFoundError."""
        place = self._place(slot)
        return (Path(place).read_bytes() if self.local else storage.read_bytes(place)).partition(b"\n")[2]

    def outcomes(self) -> dict[int, Outcome]:
        """Everything whole that is staged, by slot. Half-written files of a killed run are removed."""
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

    def discard(self, slots: Iterable[int]) -> None:
        """Remove outcomes whose shard is published."""
        for slot in slots:
            if self.local:
                Path(self._place(slot)).unlink(missing_ok=True)
            else:
                storage.remove(self._place(slot))

    def clear(self) -> None:
        """Remove the whole folder."""
        storage.remove(self.url, recursive=True)


@contextlib.contextmanager
def only_writer(out: str) -> Iterator[None]:
    """Hold the output against a second run on this machine. On object storage two runs write the same bytes.

    Raises:
        DataError: another run holds it.
    """
    if not storage.is_local(out):
        yield
        return
    path = Path(folder(out))
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another data-prep works on {out}") from error
        _remove_halves(path.parent)  # of a run that was killed
        yield
        _remove_halves(path.parent)  # of workers that were killed in this one


def _remove_halves(folder: Path) -> None:
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)
