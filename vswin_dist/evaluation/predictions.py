"""What an evaluation has found of each video, and the Parquet files that keep it, so that a killed one goes on where it was.

`ROOT/evaluations/KEY/` holds what was scored of one model on one dataset with the same views: `part-*.parquet` while it is
being scored, each with the videos that a rank had done since its last one, and at the end `predictions.parquet`, all of them
in the order of the manifest. Both are of one form and written atomically. The key names the content (weights, card, dataset,
views), not where it lies.

Shapes: N videos, K classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.evaluation.metrics import Scores, score
from vswin_dist.manifest import Manifest

FOLDER, ALL, PART = "evaluations", "predictions.parquet", "part-"
FORMAT = b"vswin-predictions"  # the key of the identity in a file's metadata
VERSION = 1  # goes up with any change of what the same model makes of the same video
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What was found of some videos: of those that were scored by row, ascending; and the others."""

    indices: NDArray[np.int64]  # [N], in the manifest
    labels: NDArray[np.int64]  # [N]
    probabilities: NDArray[np.float64]  # [N, K], the mean over the views
    missing: list[tuple[int, str]]  # (index, reason), ascending

    @classmethod
    def of(
        cls, rows: Iterable[tuple[int, int, NDArray[np.float64]]], missing: Iterable[tuple[int, str]], classes: int
    ) -> Found:
        """Put together (index, label, probabilities) of single videos in any order."""
        ordered = sorted(rows, key=lambda row: row[0])
        return cls(
            np.array([i for i, _, _ in ordered], np.int64),
            np.array([c for _, c, _ in ordered], np.int64),
            np.array([p for _, _, p in ordered], np.float64).reshape(len(ordered), classes),
            sorted(missing),
        )

    @classmethod
    def joined(cls, parts: Sequence[Found], classes: int) -> Found:
        """Put `parts` together; what stands in several of them is taken from the first, and scored rather than missing."""
        nothing = np.empty(0, np.int64)
        indices = np.concatenate([nothing, *(p.indices for p in parts)])
        indices, rows = np.unique(indices, return_index=True)
        labels = np.concatenate([nothing, *(p.labels for p in parts)])[rows]
        probabilities = np.concatenate([np.empty((0, classes)), *(p.probabilities for p in parts)])[rows]
        scored, missing = set(indices.tolist()), {i: reason for p in reversed(parts) for i, reason in p.missing}
        return cls(indices, labels, probabilities, sorted((i, r) for i, r in missing.items() if i not in scored))

    def check(self, manifest: Manifest) -> None:
        """Make sure that each video of `manifest` was found exactly once."""
        seen = [*self.indices.tolist(), *(i for i, _ in self.missing)]
        assert sorted(seen) == list(range(len(manifest.samples))), "a video was scored twice or not at all"

    def scores(self, manifest: Manifest) -> Scores:
        """Score the videos of `manifest`."""
        return score(self.probabilities, self.labels, self.missing_keys(manifest))

    def missing_keys(self, manifest: Manifest) -> list[tuple[str, str]]:
        """Give (key, reason) of the missing videos."""
        return [(manifest.samples.value("key", i), reason) for i, reason in self.missing]


@dataclass(frozen=True)
class Identity:
    """All that the scores depend on. What is equal here has equal scores, to the last digit on one kind of machine."""

    weights: str  # sha256
    card: str  # sha256
    fingerprint: str  # of the dataset
    dataset: str  # its name and split
    classes: list[str]
    clips: int
    crops: int
    batch: int  # views in one forward pass: other shapes of a product may round otherwise
    shuffle_frames: bool
    device: str
    torch: str
    version: int = VERSION

    @property
    def key(self) -> str:
        """24 hex digits that name it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]

    @property
    def views(self) -> str:
        """The views in words."""
        return f"{self.clips} x {self.crops} views{', frames in random order' if self.shuffle_frames else ''}"


@dataclass(frozen=True)
class Predictions:
    """The file `predictions.parquet`, or a part of it."""

    identity: Identity
    found: Found
    keys: list[str]  # of the scored videos
    missing: list[tuple[str, str]]  # (key, reason)

    @classmethod
    def of(cls, identity: Identity, found: Found, manifest: Manifest) -> Predictions:
        """Name the videos of `found`."""
        keys = [manifest.samples.value("key", i) for i in found.indices.tolist()]
        return cls(identity, found, keys, found.missing_keys(manifest))

    def to_parquet(self, top: int | None = None) -> bytes:
        """Encode a row for each video in the order of the manifest; the same content gives the same bytes.

        A missing video has its reason in place of probabilities.

        Args:
            top: only the `top` most probable classes, whose ids are then in a column of their own.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        f, lost = self.found, len(self.missing)
        order = np.argsort(np.concatenate([f.indices, [i for i, _ in f.missing]]), kind="stable")
        names = self.identity.classes
        best = f.probabilities.argmax(1)
        columns: dict[str, pa.Array] = {
            "index": pa.array([*f.indices.tolist(), *(i for i, _ in f.missing)], pa.int64()),
            "key": pa.array([*self.keys, *(k for k, _ in self.missing)], pa.string()),
            "class_id": pa.array([*f.labels.tolist(), *[None] * lost], pa.int32()),
            "class": pa.array([*(names[c] for c in f.labels.tolist()), *[None] * lost], pa.string()),
            "predicted": pa.array([*(names[c] for c in best.tolist()), *[None] * lost], pa.string()),
            "missing": pa.array([*[None] * len(f.indices), *(r for _, r in self.missing)], pa.string()),
        }
        kept = f.probabilities
        if top is not None:
            ranked = np.argsort(-kept, axis=1, kind="stable")[:, :top]
            kept = np.take_along_axis(kept, ranked, axis=1)
            columns["classes"] = _lists(ranked.astype(np.int32), lost)
        columns["probabilities"] = _lists(kept, lost)
        table = pa.table(columns).take(order)
        table = table.replace_schema_metadata({FORMAT: json.dumps({**asdict(self.identity), "top": top}).encode()})
        written = io.BytesIO()
        pq.write_table(table, written, compression="zstd", write_page_checksum=True)
        return written.getvalue()


def read(url: str) -> Predictions:
    """Read the file at `url`, with the probabilities of all classes.

    Raises:
        FileNotFoundError: it is absent.
        DataError: it is damaged, holds the first classes alone, or is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = storage.read_bytes(url)
    try:
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        body = json.loads((table.schema.metadata or {})[FORMAT])
        top = body.pop("top")
        identity = Identity(**body)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{url} holds no predictions of this version, or is damaged: {error}") from error
    if top is not None:
        raise DataError(f"{url} holds the first {top} classes of each video alone: name the file with all of them")
    missing = table.column("missing").to_pylist()
    scored = np.array([reason is None for reason in missing], bool)
    keys = table.column("key").to_pylist()
    indices = table.column("index").to_numpy()
    rows = table.filter(pa.array(scored))
    values = rows.column("probabilities").combine_chunks()
    found = Found(
        indices[scored].astype(np.int64),
        rows.column("class_id").to_numpy().astype(np.int64),
        np.asarray(values.flatten(), np.float64).reshape(len(rows), len(identity.classes)),
        [(int(i), r) for i, r in zip(indices, missing, strict=True) if r is not None],
    )
    lost = [(k, r) for k, r in zip(keys, missing, strict=True) if r is not None]
    return Predictions(identity, found, [k for k, s in zip(keys, scored, strict=True) if s], lost)


@dataclass(frozen=True)
class Store:
    """The folder of one evaluation, which any number of ranks write parts into, and read after a restart."""

    url: str
    identity: Identity

    @classmethod
    def below(cls, root: str, identity: Identity) -> Store:
        """Choose the folder below `root` for what has this identity."""
        return cls(storage.join(root, FOLDER, identity.key), identity)

    @property
    def predictions(self) -> str:
        """URL of the file with all videos."""
        return storage.join(self.url, ALL)

    def add(self, found: Found, manifest: Manifest) -> None:
        """Write a part: what it holds need not be scored again."""
        part = storage.join(self.url, f"{PART}{uuid.uuid4().hex}.parquet")
        storage.put_bytes(part, Predictions.of(self.identity, found, manifest).to_parquet())

    def read(self) -> Found:
        """Read what was found so far. A damaged file is passed over, with a warning: its videos are scored again."""
        parts = [self._read(name) for name in self._names()]
        return Found.joined([p for p in parts if p is not None], len(self.identity.classes))

    def finish(self, found: Found, manifest: Manifest) -> Predictions:
        """Write `predictions.parquet` and remove the parts, which it makes needless."""
        whole = Predictions.of(self.identity, found, manifest)
        storage.put_bytes(self.predictions, whole.to_parquet())
        for name in self._names():
            if name != ALL:
                storage.remove(storage.join(self.url, name))
        return whole

    def clear(self) -> None:
        """Forget everything."""
        storage.remove(self.url, recursive=True)

    def _names(self) -> list[str]:
        names = [n for n in storage.list_names(self.url) if n == ALL or n.startswith(PART)]
        return sorted(names, key=lambda n: (n == ALL, n))  # parts are newer, of videos that were missing in the whole

    def _read(self, name: str) -> Found | None:
        url = storage.join(self.url, name)
        try:
            part = read(url)
        except FileNotFoundError:  # another process has just finished; it wrote the whole before it removed parts
            return self._read(ALL) if name != ALL else None
        except DataError as error:
            _log.warning("%s. Its videos are scored again", error)
            return None
        assert part.identity == self.identity, f"{url} is of another evaluation"
        return part.found


def left(found: Found, samples: int, batch: int) -> list[int]:
    """Give the numbers of the batches of `batch` videos of which one is not scored yet.

    A missing video is tried again, with those that share its batch.
    """
    todo = np.ones(samples, bool)
    todo[found.indices] = False
    numbers: list[int] = np.unique(np.flatnonzero(todo) // batch).tolist()
    return numbers


def _lists(values: NDArray[Any], nulls: int) -> Any:
    """Give the rows of `values` [N, K] as an array of lists, with `nulls` empty places after them."""
    import pyarrow as pa

    ends = np.arange(len(values) + 1) * values.shape[1]
    lists = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values.ravel()))
    return pa.concat_arrays([lists, pa.nulls(nulls, lists.type)])
