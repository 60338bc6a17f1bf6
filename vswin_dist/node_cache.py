"""Arrays that the processes of a node share: made by one of them, mapped by all from a file of the node's own disk.

`VSWIN_CACHE/NAME.safetensors` (an eight-byte length, a JSON header, the arrays) appears whole or not at all, and is never
changed: whoever has it mapped keeps what he has when it is removed. Its pages are those of the system's file cache, so
that a node holds them once, however many processes read them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswin_dist import local_files

KEPT = 16  # files of one folder, those used last
SUFFIX = ".safetensors"
DTYPES = {"I8": "i1", "U8": "u1", "I32": "<i4", "U32": "<u4", "I64": "<i8", "F64": "<f8"}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Arrays:
    """One-dimensional arrays by name, and texts that belong to them."""

    arrays: dict[str, NDArray[Any]]
    texts: dict[str, str] = field(default_factory=dict)


def shared(name: str, make: Callable[[], Arrays]) -> Arrays:
    """Give the arrays called `name`, read-only, made by `make` where this node has none of that name yet.

    One process makes them while the others wait. Where the cache cannot be used, a line says why, and they are this
    process's own.

    Args:
        name: what they are made of must be told by it alone.
    """
    if found := load(name):
        return found
    target, made = path(name), None
    try:
        with _only_maker(target):
            if found := load(name):
                return found
            made = make()
            _save(target, made)
            _keep_newest(target.parent)
            return load(name) or made
    except OSError as error:
        print(f"every process of this node holds its own copy of {name}: {error}. Point VSWIN_CACHE to a folder", flush=True)
        return made or make()


def path(name: str) -> Path:
    """Give the file that holds the arrays called `name` on this node."""
    return local_files.cache_home() / f"{name}{SUFFIX}"


def _save(path: Path, content: Arrays) -> None:
    """Write `content` to `path`, whole or not at all; what a power cut leaves short, `load` finds to be so."""
    largest_first = sorted(content.arrays.items(), key=lambda item: -item[1].itemsize)  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": content.texts}
    end = 0
    for name, array in largest_first:
        header[name] = {"dtype": NAMES[array.dtype], "shape": [len(array)], "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with local_files.write_atomically(path, durable=False) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in largest_first:
            file.write(np.ascontiguousarray(array).data)


def load(name: str) -> Arrays | None:
    """Map the arrays called `name`; None where this node has none, or not the whole file."""
    try:
        with open(path(name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8)) if start <= size else {}
            texts = header.pop("__metadata__", None)
            if texts is None or size != start + max((entry["data_offsets"][1] for entry in header.values()), default=0):
                return None
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        os.utime(path(name))
    except (OSError, ValueError):
        return None
    arrays = {
        name: np.frombuffer(pages, DTYPES[entry["dtype"]], entry["shape"][0], start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return Arrays(arrays, texts)


@contextlib.contextmanager
def _only_maker(path: Path) -> Iterator[None]:
    """Hold what other processes wait for that are to make the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _keep_newest(folder: Path) -> None:
    """Remove all but the `KEPT` files of `folder` that were used last; what a process has mapped stays with it."""
    found = {}
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime_ns
    for path in sorted(found, key=lambda p: -found[p])[KEPT:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
