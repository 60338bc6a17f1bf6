"""What a source gives: the list of its videos, each with its class."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from data_prep.compact import Lookup, TextList
from data_prep.sources.items import Item, Items
from data_prep.stretch import Stretch
from vswin_dist import storage
from vswin_dist.errors import ConfigError, DataError, nearest
from vswin_dist.manifest import FILE_NAME, nfc, read_manifest


@dataclass
class Listing:
    """All of a source: its videos in a fixed order, and what lies there without being named by it.

    Where the videos lie in tar archives, `archives` gives these: every inner list is one tar, cut into that many
    files; `find` then gives the items of a member's name, none where no row names it; as they are among `items`, but for the
    `is_file` of their stretch.
    """

    items: Items  # or any of `Item`, which are made into them
    unlabelled: Sequence[str] = ()  # videos without a row
    classes: list[str] | None = None  # the order of the class ids that the source itself states
    archives: list[list[str]] = field(default_factory=list)
    find: Callable[[str], Sequence[Item]] = lambda _: ()
    notes: list[str] = field(default_factory=list)  # what is to be said of it before the start

    def __post_init__(self) -> None:
        if not isinstance(self.items, Items):
            self.items = Items.of(self.items)


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


def fragment(name: str, stretch: Stretch) -> str:
    """Make the source id of a stretch of the video `name`: a media fragment, `film.mp4#t=10,20`."""
    return f"{name}#t={stretch}"


BESIDE = (".csv", ".txt", ".json", ".md", ".md5", ".sha256")  # what may lie beside archives
NO_VIDEOS = (  # what downloaders put beside a video under its name
    *BESIDE,
    *(".jpg", ".jpeg", ".png", ".webp"),
    *(".m4a", ".mp3", ".aac", ".opus", ".wav", ".flac"),
    *(".vtt", ".srt", ".xml", ".log", ".part", ".ytdl", ".tmp"),
)


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
    """Say whether `name` is that of a tar archive."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz"))


def is_no_video(name: str) -> bool:
    """Say whether the ending of `name` is that of a file which lies beside a video: a picture, sound, subtitles, a part."""
    return name.lower().endswith(NO_VIDEOS)


def find_archives(url: str) -> list[str]:
    """Find the archives that `url` means, sorted by the numbers in their names; `[]` where it is a folder of videos.

    `url` is an archive, a pattern (`.../part_*.tar.gz`), a text file (.txt) of URLs, or a folder of archives.

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
    """Give a sort key by which part_2 comes before part_10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _glob(url: str) -> list[str]:
    def read() -> list[str]:
        fs, path = storage.filesystem(url)
        return [p if storage.is_local(url) else fs.unstrip_protocol(p) for p in fs.glob(path)]

    return storage.with_retry(read, url)


def find_files(url: str) -> TextList:
    """List the paths of all files below the folder `url`, relative to it, sorted; hidden files and folders are left out.

    Raises:
        DataError: there is no such folder, or it holds no file.
    """
    folder = storage.absolute(url)

    def read() -> TextList:
        fs, path = storage.filesystem(folder)
        if not fs.exists(path):
            raise DataError(f"video folder {url} does not exist")
        found = TextList()
        for name in _walk(path.rstrip("/"), "") if storage.is_local(folder) else _find(fs, path.rstrip("/")):
            if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that are not text
                raise DataError(f"{url}: the file name {name!a} is not UTF-8; rename it")
            found.append(name)
        return found

    files = storage.with_retry(read, url)
    if not files:
        raise DataError(f"video folder {url} holds no files")
    return files


def _walk(root: str, below: str) -> Iterator[str]:
    """Give the paths of the files of a local folder in the order of the whole paths, which no list then has to be sorted in.

    Names alone are read: to ask for the state of every file takes seconds for a hundred thousand of them.
    """
    try:
        with os.scandir(f"{root}/{below}") as entries:
            names = sorted(e.name + "/" * _is_folder(e) for e in entries if not e.name.startswith("."))
    except OSError:  # as one that may not be read, or a link in a circle
        return
    for name in names:
        if name.endswith("/"):
            yield from _walk(root, below + name)
        else:
            yield below + name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _find(fs: Any, path: str) -> Iterator[str]:
    """Give the paths of the files of a remote folder, sorted, in one listing for each of the folders in it.

    Empty objects that stand for folders, as consoles of S3 make them (`videos/`, `videos/c1/`), are no files.
    What a file system says of a file takes kilobytes; it is let go with each of these.
    """
    found = fs.ls(path, detail=True)
    folders = {str(entry["name"]).rstrip("/") for entry in found if entry["type"] == "directory"} - {path}
    names = {str(entry["name"]) for entry in found if entry["type"] != "directory"}
    del found
    for place in sorted(folders | names, key=lambda place: place + "/" * (place in folders)):
        if place in names:
            inner = [place]
        elif place.rsplit("/", 1)[-1].startswith("."):
            continue
        else:
            inner = sorted(map(str, fs.find(place)))
        for file in inner:
            name = file.removeprefix(f"{path}/")
            parts = name.split("/")
            if name != file and parts[-1] and not any(part.startswith(".") for part in parts):
                yield name


def read_text(url: str, what: str) -> str:
    """Read the text of the file at `url` (UTF-8, with or without a byte-order mark).

    Raises:
        DataError: absent or not a text; `what` says what it was meant to be.
    """
    try:
        return storage.read_bytes(url).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{what} {url} does not exist") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"{what} {url} is not a text file: {error}") from error


def read_lines(url: str, what: str) -> Iterator[str]:
    """Read the text of the file at `url` as `read_text` does, a line at a time, with the newline that ends it.

    Raises:
        DataError: absent or not a text; `what` says what it was meant to be.
    """
    number = 0
    try:
        with storage.local_copy(url) as path, open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{what} {url} does not exist") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        line_number = f"line {number}: " if number else ""
        raise DataError(f"{what} {url} is not a text file: {line_number}{error}") from error


def read_classes(url: str) -> list[str]:
    """Read class names in the order of their ids: from a manifest (its file or folder), or a text file, one per line.

    Raises:
        DataError: absent, empty, or a name stands twice.
    """
    if url.endswith(".json") or storage.exists(storage.join(storage.absolute(url), FILE_NAME)):
        return list(read_manifest(url).classes)
    names = [line.strip() for line in read_text(url, "class list").splitlines() if line.strip()]
    if not names:
        raise DataError(f"class list {url} is empty")
    forms = [nfc(name) for name in names]
    if len(set(forms)) != len(forms):
        twice = next(n for i, n in enumerate(forms) if n in forms[:i])
        raise DataError(f"class list {url} has {twice!r} twice")
    return names


def first_per_id(rows: Iterable[Item], index: str) -> tuple[Items, Lookup, list[str]]:
    """Keep the first of `rows`, which have no file yet, of each source id.

    Rows that have one id and mean other stretches, as of one whole second, are told apart by their exact times as well.

    Returns:
        The items, what finds their numbers by the composed form of their ids (see `nfc`), and what is to be said of rows of
        `index` that stand twice.
    """
    kept = Items()
    numbers = Lookup(lambda number: nfc(kept.source_id(number)))
    repeated, others = TextList(), TextList()  # of the same class, and of another
    for row in rows:
        first = numbers.find(nfc(row.source_id))
        if first >= 0 and row.stretch and kept.stretch(first) not in (None, row.stretch):
            row = replace(row, source_id=fragment(row.source_id, row.stretch))
        first = numbers.add(nfc(row.source_id), len(kept))
        if first == len(kept):
            kept.append(row.source_id, row.class_name, -1, row.stretch)
        else:
            (repeated if nfc(kept.class_name(first)) == nfc(row.class_name) else others).append(row.source_id)
    notes = [f"{index}: {len(repeated):,} rows stand twice and are kept once: {some(repeated)}"] if repeated else []
    if others:
        notes.append(f"{index}: {len(others):,} rows name another class than a row before, which counts: {some(others)}")
    return kept, numbers, notes


def check_present(items: Items, index: str, videos: str) -> None:
    """Check that at least one of the `items` of `index` has a file below `videos`.

    Raises:
        DataError: none has, as where another folder was given.
    """
    if not len(items.present()):
        raise DataError(
            f"none of the {len(items)} videos of {index} is below {videos}, for instance "
            f"{items.source_id(0)!r}; there lie for instance {items.files[0]!r}"
        )


def class_list(items: Items, wanted: list[str] | None) -> list[str]:
    """Put the class names in the order of their ids: `wanted`, else the sorted names of `items`.

    A name that `items` write in several ways (see `nfc`) is one class, in its composed form.

    Raises:
        DataError: an item's class is not among `wanted`.
    """
    if wanted is None:
        spellings: dict[str, set[str]] = {}
        for name in items.class_names:
            spellings.setdefault(nfc(name), set()).add(name)
        return sorted(form if len(names) > 1 else names.pop() for form, names in spellings.items())
    known = {nfc(name) for name in wanted}
    for name in items.class_names:
        if nfc(name) not in known:
            raise DataError(
                f"class {name!r} (of {items.first_of_class(name).source_id}) is not among the {len(wanted)} names of "
                f"--classes.{nearest(name, wanted)}"
            )
    return wanted


def class_ids(classes: list[str]) -> dict[str, int]:
    """Give the id of every class by its name in the composed form, by which it is to be looked up (see `nfc`)."""
    return {nfc(name): i for i, name in enumerate(classes)}


def note_of_empty(listing: Listing, classes: list[str]) -> list[str]:
    """Say which of the classes have no video; in archives, no row: what these hold is not known yet."""
    items = listing.items
    filled = set(map(nfc, items.class_names if listing.archives else items.present_classes()))
    empty = [name for name in classes if nfc(name) not in filled]
    return [f"{len(empty):,} of {len(classes):,} classes have no video: {some(empty)}"] if empty else []


def some(names: Sequence[str], most: int = 5) -> str:
    """Name the first few of `names`, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def spec(source: Source) -> dict[str, Any]:
    """Describe the source by plain values, from which `sources.build` makes it again."""
    return {"kind": source.kind, **vars(source)}
