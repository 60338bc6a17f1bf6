"""One reader of JSON records: what is absent, unreadable, of another format or half known is named in one line."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vswin_dist.errors import CheckpointError, DataError
from vswin_dist.records import read_record


@dataclass(frozen=True)
class File:
    bytes: int
    note: str | None = None


@dataclass(frozen=True)
class Made:
    name: str
    fps: float
    files: dict[str, File]
    parts: list[File]
    anything: dict[str, Any]
    tags: list[str] = field(default_factory=list)


BODY: dict[str, Any] = {
    "format": "f",
    "version": 2,
    "name": "x",
    "fps": 25,
    "files": {"a": {"bytes": 3}},
    "parts": [{"bytes": 1, "note": "n"}],
    "anything": {"deep": [None, {"er": 1}]},
}


def written(folder: Path, **changes: Any) -> str:
    body = {k: v for k, v in (BODY | changes).items() if v is not ...}
    (folder / "r.json").write_text(json.dumps(body))
    return str(folder / "r.json")


def test_a_record_is_read_with_what_it_holds(tmp_path: Path) -> None:
    found = read_record(written(tmp_path), Made, format="f", version=2)
    assert found == Made("x", 25, {"a": File(3)}, [File(1, "n")], BODY["anything"])
    assert read_record(written(tmp_path, tags=["t"]), Made, format="f", version=2).tags == ["t"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": ...}, "format None, version 2; expected 'f', 2"),
        ({"version": 3}, "format 'f', version 3; expected 'f', 2"),
        ({"name": ...}, "name is missing"),
        ({"more": 1}, "more is unknown"),
        ({"name": None}, "name is null, not text"),
        ({"fps": "25"}, "fps is text, not a number"),
        ({"files": []}, "files is a list, not an object"),
        ({"files": {"a": {"bytes": True}}}, "files.a.bytes is true or false, not a whole number"),
        ({"files": {"a": {}}}, "files.a.bytes is missing"),
        ({"parts": [{"bytes": 1}, {"bytes": 1, "size": 2}]}, "parts[1].size is unknown"),
        ({"parts": [7]}, "parts[0] is a whole number, not an object"),
        ({"parts": [{"bytes": 1, "note": 2}]}, "parts[0].note is a whole number, not text"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    url = written(tmp_path, **changes)
    with pytest.raises(DataError) as error:
        read_record(url, Made, format="f", version=2, what="thing")
    assert str(error.value) == f"{url} is not a valid thing: {words}"


@pytest.mark.parametrize(("text", "words"), [("{", "it is not JSON: "), ("[]", "it holds a list, not an object")])
def test_what_is_no_object_is_refused_as_the_caller_wants(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_record(str(tmp_path / "r.json"), Made, error=CheckpointError)
    (tmp_path / "r.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CheckpointError, match="it is not JSON"):
        read_record(str(tmp_path / "r.json"), Made, error=CheckpointError)
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        read_record(str(tmp_path / "none.json"), Made)
