"""What a source gives: the list of its videos, each with its class."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from vswin_dist import storage
from vswin_dist.errors import ConfigError, DataError, nearest
from vswin_dist.manifest import FILE_NAME, read_manifest


@dataclass(frozen=True, slots=True)
class Item:
    """One video that the source names. `url` is "" where the source names a video that is not there."""

    source_id: str  # unique within the source; a relative path or an id
    class_name: str
    url: str


@dataclass
class Listing:
    """All of a source: its videos in a fixed order, and what lies there without being named by it.

    Where the videos lie in tar archives, `archives` gives these: every inner list is one tar, cut into that many
    files; `find` then gives the item of a member's name, None where no row names it.
    """

    items: list[Item]
    unnamed: list[str] = field(default_factory=list)  # videos without a row
    classes: list[str] | None = None  # the order of the class ids that the source itself states
    archives: list[list[str]] = field(default_factory=list)
    find: Callable[[str], Item | None] = lambda _: None


class Source(Protocol):
    """A kind of dataset. `kind` is its word on the command line; its fields are plain values (kept in the journal)."""

    @property
    def kind(self) -> str:
        """Its word on the command line."""

    def listing(self) -> Listing:
        """List every video; the order must not depend on the storage. Raises DataError where it cannot be read."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the options of this kind."""

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Source:
        """Make the source from parsed options."""


BESIDE = (".csv", ".txt", ".json", ".md", ".md5", ".sha256")  # what may lie beside archives


_SECRET = re.compile(r"[?&][^=&]*(signature|credential|token|sig|secret|password|accesskeyid)[^=&]*=", re.IGNORECASE)


def check_url(url: str) -> None:
    """Refuse a URL that carries a user, a password or a signature: URLs go into journals, manifests and logs.

    Raises:
        ConfigError: it does; the URL is not repeated.
    """
    scheme, _, rest = url.partition("://")
    if rest and ("@" in rest.partition("/")[0] or _SECRET.search(rest)):
        raise ConfigError(f"a URL ({scheme}://...) must not carry credentials; give them in the environment")


def is_archive(name: str) -> bool:
    """True for the names of tar archives."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def find_archives(url: str) -> list[str]:
    """The archives that `url` means, sorted by the numbers in their names; ``[]`` where it is a folder of videos.

    `url` is an archive, a pattern (``.../part_*.tar.gz``), a text file (.txt) of URLs, or a folder of archives.

    Raises:
        DataError: a pattern that matches nothing, or an empty list.
    """
    if "*" in url or ("?" in url and not url.startswith("http")):
        found = _glob(url)
    elif is_archive(url):
        found = [storage.absolute(url)]
    elif url.endswith(".txt"):
        found = [line.strip() for line in read_text(url, "list of archives").splitlines() if line.strip()]
    else:
        names = _names_below(storage.absolute(url))
        found = [storage.join(storage.absolute(url), name) for name in names if is_archive(name)]
        others = [n for n in names if not is_archive(n) and not n.startswith(".") and not n.endswith(BESIDE)]
        return [] if others else sorted(found, key=natural)
    if not found:
        raise DataError(f"{url} matches no archive")
    return sorted(found, key=natural)


def _names_below(folder: str) -> list[str]:
    """As `storage.list_names`, which asks for the state of every file: seconds for a hundred thousand of them."""
    return sorted(os.listdir(folder)) if storage.is_local(folder) and os.path.isdir(folder) else storage.list_names(folder)


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which part_2 comes before part_10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _glob(url: str) -> list[str]:
    def read() -> list[str]:
        fs, path = storage.filesystem(url)
        return [p if storage.is_local(url) else fs.unstrip_protocol(p) for p in fs.glob(path)]
    return storage.with_retry(read, url)


def find_files(url: str) -> list[str]:
    """Paths of all files below the folder `url`, relative to it, sorted; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder, or it holds no file.
    """
    folder = storage.absolute(url)

    def read() -> list[str]:
        fs, path = storage.filesystem(folder)
        if not fs.exists(path):
            raise DataError(f"video folder {url} does not exist")
        prefix = path.rstrip("/") + "/"
        if storage.is_local(folder):  # without asking for the state of every file
            return sorted(f"{root}/{name}".replace("//", "/")[len(prefix):]
                          for root, _, names in os.walk(path, followlinks=True) for name in names)
        return sorted(str(p)[len(prefix):] for p in fs.find(path) if str(p).startswith(prefix))

    files = [f for f in storage.with_retry(read, url) if not any(part.startswith(".") for part in f.split("/"))]
    if not files:
        raise DataError(f"video folder {url} holds no files")
    for name in files:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are no text
            raise DataError(f"{url}: the file name {name!a} is not UTF-8; rename it")
    return files


def read_text(url: str, what: str) -> str:
    """The text of the file at `url` (UTF-8, with or without a byte-order mark).

    Raises:
        DataError: absent or no text; `what` says what it was meant to be.
    """
    try:
        return storage.read_bytes(url).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{what} {url} does not exist") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {url} is not a text file: {error}") from error


def read_classes(url: str) -> list[str]:
    """Class names in the order of their ids: from a manifest (its file or folder), or a text file, one per line.

    Raises:
        DataError: absent, empty, or a name stands twice.
    """
    if url.endswith(".json") or storage.exists(storage.join(storage.absolute(url), FILE_NAME)):
        return list(read_manifest(url).classes)
    names = [line.strip() for line in read_text(url, "class list").splitlines() if line.strip()]
    if not names:
        raise DataError(f"class list {url} is empty")
    if len(set(names)) != len(names):
        twice = next(n for i, n in enumerate(names) if n in names[:i])
        raise DataError(f"class list {url} has {twice!r} twice")
    return names


def first_per_id(items: Iterable[Item]) -> tuple[list[Item], list[str]]:
    """Keep the first item of each source id; the second value lists the ids that came again."""
    seen: set[str] = set()
    kept: list[Item] = []
    again: list[str] = []
    for item in items:
        if item.source_id in seen:
            again.append(item.source_id)
        else:
            seen.add(item.source_id)
            kept.append(item)
    return kept, again


def class_list(items: Iterable[Item], wanted: list[str] | None) -> list[str]:
    """The class names in the order of their ids: `wanted`, else the sorted names of `items`.

    Raises:
        DataError: an item's class is not among `wanted`.
    """
    if wanted is None:
        return sorted({item.class_name for item in items})
    known = set(wanted)
    for item in items:
        if item.class_name not in known:
            raise DataError(f"class {item.class_name!r} (of {item.source_id}) is not among the {len(wanted)} names of "
                            f"--classes.{nearest(item.class_name, wanted)}")
    return wanted


def spec(source: Source) -> dict[str, Any]:
    """The source as plain values, from which `sources.build` makes it again."""
    return {"kind": source.kind, **vars(source)}
