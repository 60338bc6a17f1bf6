"""Predictions for many videos as Parquet files in one folder, so that a job that was killed goes on where it was.

`OUT/part-*.parquet` have a row for each video: its key, the URL of its file, the most probable classes with their scores
and, if asked for, the features of the last stage; of a video that is absent or does not decode, in `error`, why. A key names
one video: another one with the same key is refused. A part is written whole or not at all, and is named by its videos, so
that it is never there twice. `pandas.read_parquet(OUT)` reads all of them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.manifest import FILE_NAME, read_manifest, shard_url
from vswin_dist.model_card import CARD, WEIGHTS
from vswin_dist.serving.predict import Predictor

PART = "part-"
FORMAT = b"vswin-batch-predictions"  # the key of the identity in a file's metadata
VERSION = 2  # goes up with any change of the columns
SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
AHEAD = 2  # groups of videos that are decoded while one is scored


class Video(NamedTuple):
    """A video, and where its bytes are."""

    key: str
    url: str
    offset: int = 0
    size: int = 0  # 0: the whole file
    crc32: int = 0

    def read(self) -> bytes | str:
        """Give what `Predictor.views` takes.

        Raises:
            DataError: of a shard, other bytes. StorageError: the storage fails.
        """
        if not self.size:
            return self.url
        try:
            return storage.read_range(self.url, self.offset, self.size, self.crc32)
        except FileNotFoundError as error:
            raise DataError(str(error)) from error


@dataclass(frozen=True)
class Identity:
    """All that the rows depend on."""

    weights: str  # sha256
    card: str  # sha256
    clips: int
    crops: int
    top: int
    features: bool
    version: int = VERSION

    @classmethod
    def of(cls, folder: str, clips: int, crops: int, top: int, features: bool) -> Identity:
        """Read the model's files in `folder` for it."""
        weights, card = (storage.sha256(storage.join(storage.absolute(folder), name)) for name in (WEIGHTS, CARD))
        return cls(weights, card, clips, crops, top, features)


def find_videos(places: Sequence[str]) -> tuple[list[Video], list[str]]:
    """Find the videos at `places`: files, folders or buckets (whatever has a video's name below them), lists (`*.txt`, a
    path or URL in a line) and shards (a folder with a manifest).

    Returns:
        Each video once, in this order; and what was left out, in words.

    Raises:
        DataError: nothing is there, or another video with the same key; names the place.
    """
    found: dict[str, Video] = {}
    notes, twice = [], 0
    for place in places:
        videos, others = _videos_at(storage.absolute(place), place)
        if not videos:
            raise DataError(f"no video at {place}")
        if others:
            notes.append(f"left out {others:,} files of {place} that have no video's name ({', '.join(SUFFIXES)})")
        twice += len(videos)
        for video in videos:
            _check_same(video, found.setdefault(video.key, video).url)
    if twice := twice - len(found):
        notes.append(f"left out {twice:,} videos that were named before")
    return list(found.values()), notes


def _videos_at(url: str, place: str) -> tuple[list[Video], int]:
    """Give the videos at `url`, and the number of other files there."""
    if storage.exists(storage.join(url, FILE_NAME)):
        manifest = read_manifest(url)
        shards = [shard_url(url, shard) for shard in manifest.shards]
        return [Video(s.key, shards[s.shard], s.offset, s.size, s.crc32) for s in manifest.samples], 0
    if storage.is_file(url):
        names = _listed(url, place) if url.endswith(".txt") else [place]
        return [Video(name, storage.absolute(name)) for name in names], 0
    files = storage.find(url)
    named = [file for file in files if file.lower().endswith(SUFFIXES)]
    return [Video(storage.join(place, file), storage.join(url, file)) for file in named], len(files) - len(named)


def _listed(url: str, place: str) -> list[str]:
    """Give the lines of a list, UTF-8 with or without a byte-order mark, but for empty ones."""
    try:
        lines = storage.read_bytes(url).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is no list of videos, which is a text in UTF-8: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _check_same(video: Video, url: str) -> None:
    """Refuse a video whose key names what stands at another `url`."""
    if video.url != url:
        raise DataError(
            f"two videos have the key {video.key!r}, one in {url} and one in {video.url}: give each set of videos an --out "
            "of its own"
        )


class Known(NamedTuple):
    """What a row that is there says of its video."""

    url: str
    error: str | None  # what is wrong with it


@dataclass(frozen=True)
class Store:
    """The folder that the rows go to."""

    url: str
    identity: Identity

    def done(self) -> dict[str, Known]:
        """Give the keys of the rows that are there, and what they say.

        Raises:
            DataError: they are of another model or of other options, or damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        found: dict[str, Known] = {}
        for name in storage.list_names(self.url):
            if not name.startswith(PART):
                continue
            url = storage.join(self.url, name)
            try:
                table = pq.ParquetFile(pa.BufferReader(storage.read_bytes(url))).read(["key", "url", "error"])
                known = Identity(**json.loads((table.schema.metadata or {})[FORMAT]))
            except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{url} holds no predictions of this version, or is damaged: {error}. Remove it") from error
            if known != self.identity:
                differ = ", ".join(k for k, v in asdict(known).items() if v != getattr(self.identity, k))
                raise DataError(f"{self.url} holds predictions with other {differ}: name another --out, or give --fresh")
            found |= {row["key"]: Known(row["url"], row["error"]) for row in table.to_pylist()}
        return found

    def add(self, rows: Sequence[Row]) -> None:
        """Write the rows of one part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts, numbers = pa.list_(pa.string()), pa.list_(pa.float32())
        columns = {
            "key": pa.array([row.key for row in rows], pa.string()),
            "url": pa.array([row.url for row in rows], pa.string()),
            "classes": pa.array([[n for n, _ in row.best] or None for row in rows], texts),
            "scores": pa.array([[p for _, p in row.best] or None for row in rows], numbers),
        }
        if self.identity.features:
            columns["features"] = pa.array([row.features for row in rows], numbers)
        columns["error"] = pa.array([row.error for row in rows], pa.string())
        table = pa.table(columns).replace_schema_metadata({FORMAT: json.dumps(asdict(self.identity)).encode()})
        written = io.BytesIO()
        pq.write_table(table, written, compression="zstd", write_page_checksum=True)
        name = hashlib.sha256("\n".join(row.key for row in rows).encode()).hexdigest()[:24]
        storage.put_bytes(storage.join(self.url, f"{PART}{name}.parquet"), written.getvalue())

    def clear(self) -> None:
        """Remove all parts."""
        for name in storage.list_names(self.url):
            if name.startswith(PART):
                storage.remove(storage.join(self.url, name))


@dataclass(frozen=True)
class Row:
    """What was found of one video."""

    key: str
    url: str
    best: tuple[tuple[str, float], ...] = ()
    features: list[float] | None = None
    error: str | None = None


def predict_part(predictor: Predictor, videos: Sequence[Video], identity: Identity, threads: int, group: int) -> list[Row]:
    """Predict `videos`, `group` of them in one forward pass, while `threads` decode the next.

    Raises:
        StorageError: the storage fails; nothing is said of the videos then.
    """
    rows: list[Row] = []
    with ThreadPoolExecutor(threads) as pool:
        for some, views in _ahead(pool, predictor, videos, group):
            good = [v for v in views if not isinstance(v, DataError)]
            found = iter(_score(predictor, good, identity) if good else ())
            for video, mine in zip(some, views, strict=True):
                said = {"error": str(mine)} if isinstance(mine, DataError) else next(found)
                rows.append(Row(video.key, video.url, **said))
    return rows


def _score(predictor: Predictor, views: Sequence[Tensor], identity: Identity) -> Iterator[dict[str, Any]]:
    if identity.features:
        scores, features = predictor.scores_and_features(views)
        lists = features.tolist()
    else:
        scores, lists = predictor.scores(views), [None] * len(views)
    return ({"best": predictor.best(s, identity.top), "features": f} for s, f in zip(scores, lists, strict=True))


def _ahead(
    pool: ThreadPoolExecutor, predictor: Predictor, videos: Sequence[Video], group: int
) -> Iterator[tuple[Sequence[Video], list[Tensor | DataError]]]:
    """Give `group` videos at a time with their views, or what is wrong with them, decoded in `pool` ahead of time."""

    def views(video: Video) -> Tensor | DataError:
        try:
            return predictor.views(video.read())
        except DataError as error:
            return error

    waiting: deque[tuple[Sequence[Video], list[Future[Tensor | DataError]]]] = deque()
    for start in range(0, len(videos), group):
        some = videos[start : start + group]
        waiting.append((some, [pool.submit(views, video) for video in some]))
        if len(waiting) > AHEAD:
            first, futures = waiting.popleft()
            yield first, [future.result() for future in futures]
    for first, futures in waiting:
        yield first, [future.result() for future in futures]


def parts(videos: Sequence[Video], done: Mapping[str, Known], size: int) -> list[list[Video]]:
    """Cut what is left of `videos` into parts of `size`.

    Raises:
        DataError: a row that is there is of another video with the same key.
    """
    for video in videos:
        if video.key in done:
            _check_same(video, done[video.key].url)
    left = [video for video in videos if video.key not in done]
    return [left[start : start + size] for start in range(0, len(left), size)]
