"""JSON records on disk: what a file must hold is said by a dataclass, and what is wrong with it in one line.

A field's type is checked as far as JSON knows types, nested dataclasses and lists and mappings of them included.
A field without a default must be there; one that the dataclass does not have is refused, since a record of another
version would be half understood.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from vswin_dist import storage
from vswin_dist.errors import DataError, VswinError

T = TypeVar("T")
FORMAT, VERSION = "format", "version"  # keys of a record that says what it is
KEY = "key"  # of a field's metadata: its name in the file, where that is another
_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a whole number", float: "a number"}


class _Invalid(Exception):
    """What is wrong with a record, without the words for which one it is."""


def read_record(
    url: str,
    cls: type[T],
    *,
    format: str | None = None,
    version: int | tuple[int, ...] | None = None,
    what: str = "record",
    error: type[VswinError] = DataError,
) -> T:
    """Read the JSON object at `url` as a `cls`.

    Args:
        cls: a dataclass.
        format: the value of the object's key `format`; None: it has no such key.
        version: likewise; several where those of earlier versions are read alike.
        what: the noun for such a file in messages.
        error: the class of the error for a file that is not valid.

    Raises:
        FileNotFoundError: it is absent.
        StorageError: it cannot be read.
        error: it is not such a record; names `url` and what is wrong.
    """
    return parse_record(storage.read_bytes(url), url, cls, format=format, version=version, what=what, error=error)


def parse_record(
    data: bytes | str,
    url: str,
    cls: type[T],
    *,
    format: str | None = None,
    version: int | tuple[int, ...] | None = None,
    what: str = "record",
    error: type[VswinError] = DataError,
) -> T:
    """Turn the JSON text of an object into a `cls`, as `read_record` does; `url` is where `data` was read.

    Raises:
        error: it is not such a record; names `url` and what is wrong.
    """
    try:
        try:
            body = json.loads(data)
        except ValueError as invalid:
            raise _Invalid(f"it is not JSON: {invalid}") from invalid
        if not isinstance(body, dict):
            raise _Invalid(f"it holds {_name(body)}, not an object")
        versions = version if isinstance(version, tuple) else (version,)
        expected = {k: v for k, v in ((FORMAT, (format,)), (VERSION, versions)) if v != (None,)}
        found = {k: body.pop(k, None) for k in expected}
        if any(found[k] not in values for k, values in expected.items()):
            raise _Invalid(f"{_said(found)}; expected {', '.join(' or '.join(map(repr, v)) for v in expected.values())}")
        return typing.cast(T, _build(cls, body, ""))
    except _Invalid as invalid:
        raise error(f"{url} is not a valid {what}: {invalid}") from invalid


class _Entry(typing.NamedTuple):
    """A field of a dataclass, by its key in the file: its name, its type, and whether it must be there."""

    name: str
    hint: Any
    required: bool


@functools.cache  # thousands of entries of a list are of one class
def _known(cls: typing.Hashable) -> dict[str, _Entry]:
    hints = typing.get_type_hints(cls)
    return {
        f.metadata.get(KEY, f.name): _Entry(f.name, hints[f.name], f.default is f.default_factory is MISSING)
        for f in fields(cls)  # type: ignore[arg-type] # a dataclass
    }


def _said(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v!r}" for k, v in values.items())


def _name(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def _build(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint`; `path` names it within the record."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        [hint] = [a for a in arguments if a is not type(None)]
        return _build(hint, value, path)
    if isinstance(kind, type) and is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    if kind in _NAMES and type(value) is not kind and not (kind is float and type(value) is int):
        raise _Invalid(f"{path} is {_name(value)}, not {_NAMES[kind]}")
    if kind is list and arguments and arguments[0] is not Any:
        return [_build(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if kind is dict and arguments and arguments[1] is not Any:
        return {k: _build(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    return value


def _build_dataclass(cls: type[Any], value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise _Invalid(f"{path} is {_name(value)}, not an object")
    known, prefix = _known(cls), f"{path}." if path else ""  # type: ignore[arg-type] # a class is hashable
    if missing := [n for n, entry in known.items() if entry.required and n not in value]:
        raise _Invalid(f"{prefix}{missing[0]} is missing")
    if unknown := [n for n in value if n not in known]:
        raise _Invalid(f"{prefix}{unknown[0]} is unknown")
    built = {}
    for n, v in value.items():
        name, hint, _ = known[n]
        built[name] = v if type(v) is hint else _build(hint, v, f"{prefix}{n}")
    return cls(**built)
