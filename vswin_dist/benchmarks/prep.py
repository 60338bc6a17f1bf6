"""Speed of the parts beside the tools one would use without them; ratios are of the same run. See `measure`.

`jobs/benchmark.py prep` prints it. An `ffmpeg` program is needed for the comparisons with it (on the path, or named
by `VSWIN_FFMPEG`); it is no part of the package.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path

import av

from data_prep.encode import Outcome
from data_prep.executor import LocalExecutor
from data_prep.journal import Staging
from data_prep.pack import Entry, write_shard
from data_prep.pipeline import shard_dataset
from data_prep.settings import Encoding, PrepSettings
from data_prep.sources import KINDS, Item, Source
from data_prep.sources.folder import FolderSource
from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.manifest import Manifest

CLIP_FRAMES, CLIP_STRIDE = 32, 2
QUIET = "-v error -nostdin -threads 1"
X264 = "-c:v libx264 -preset veryfast -crf 23 -tune fastdecode -g 16 -keyint_min 16 -sc_threshold 0 -threads 1"
EVERYTHING = Encoding(min_frames=1, max_bad=1.0)


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and of all processors (this process and its children)."""

    clock: float
    processor: float


@contextmanager
def _measured(into: list[Cost]) -> Iterator[None]:
    clock, processor = time.perf_counter(), _processor()
    yield
    into.append(Cost(time.perf_counter() - clock, _processor() - processor))


def _processor() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def _best(costs: list[Cost]) -> Cost:
    return min(costs, key=lambda cost: cost.clock)


@dataclass(frozen=True)
class Line:
    """One comparison of the same work done by ours and by the other; a ratio above 1 is faster than the other.

    Seconds on the clock depend on what else the machine does, seconds of the processors hardly.
    """

    what: str
    ours: Cost
    other: str
    theirs: Cost
    wanted: float  # the least ratio that is asked for

    @property
    def ratio(self) -> float:
        """Speed of ours as a multiple of the other's, by the clock."""
        return self.theirs.clock / self.ours.clock

    @property
    def processor_ratio(self) -> float:
        """The same by processor time."""
        return self.theirs.processor / self.ours.processor

    def __str__(self) -> str:
        return (
            f"{self.what} against {self.other}: {self.ours.clock:.2f} s against {self.theirs.clock:.2f} s, "
            f"{self.ratio:.2f}x; of the processors {self.ours.processor:.2f} s against "
            f"{self.theirs.processor:.2f} s, {self.processor_ratio:.2f}x (asked for: {self.wanted}x)"
        )


def ffmpeg() -> str | None:
    """Return the ffmpeg program to compare with."""
    return os.environ.get("VSWIN_FFMPEG") or shutil.which("ffmpeg")


def measure(source: Source, most: int = 200, workers: int | None = None) -> list[Line]:
    """Compare on at most `most` local videos of `source`, with `workers` processes on either side.

    Raises:
        DataError: the source's videos are not files of this machine.
    """
    items = [item for item in source.listing().items if item.url][:most]
    if not items or not all(storage.is_local(item.url) for item in items):
        raise DataError("the benchmark needs videos that are files of this machine")
    count = workers or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="data-prep-bench-") as folder:
        files = _links(items, Path(folder, "in"))
        train, train_s = _prepare(f"{folder}/in", EVERYTHING, f"{folder}/train", count)
        copy, copy_s = _prepare(f"{folder}/in", replace(EVERYTHING, profile="copy"), f"{folder}/copy", count)
        lines = [_packing(copy, files, folder), _decoding(train, f"{folder}/train", files)]
        if program := ffmpeg():
            encode = _ffmpeg(files, count, lambda file, n: _encode_command(program, file, f"{folder}/{n}.mp4"))
            decode = _ffmpeg(files, count, lambda file, _: _decode_command(program, file))
            lines = [
                Line(f"train, {len(files)} videos", train_s, f"ffmpeg per file, {count} at a time", encode, 0.9),
                Line(f"copy, {len(files)} videos", copy_s, f"ffmpeg -f null per file, {count} at a time", decode, 0.9),
                *lines,
            ]
        return lines


def _encode_command(program: str, file: str, target: str) -> list[str]:
    """Give the command that makes of `file` what the profile `train` makes."""
    scale = (
        r"scale='trunc(iw*min(1\,256/min(iw\,ih))/2+0.5)*2':'trunc(ih*min(1\,256/min(iw\,ih))/2+0.5)*2'"
        ":flags=bicubic+accurate_rnd+bitexact,format=yuv420p,setsar=1"
    )
    return [program, *QUIET.split(), "-filter_threads", "1", "-i", file, "-an", "-vf", scale, *X264.split(), "-y", target]


def _decode_command(program: str, file: str) -> list[str]:
    return [program, *QUIET.split(), "-i", file, "-an", "-f", "null", "-"]


def _links(items: list[Item], folder: Path) -> list[str]:
    """Links to the videos below one folder per class, numbered so that every name is its own."""
    made = []
    for number, item in enumerate(items):
        link = folder / re.sub(r"\W+", "_", item.class_name) / f"{number:06d}-{Path(item.url).name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(item.url)
        made.append(str(link))
    return made


def _prepare(videos: str, encoding: Encoding, out: str, workers: int) -> tuple[Manifest, Cost]:
    costs: list[Cost] = []
    with _measured(costs):
        manifest = shard_dataset(
            FolderSource(videos),
            out,
            PrepSettings(encoding),
            executor=partial(LocalExecutor, workers),
            show_progress=False,
        )
    return manifest, costs[0]


def _ffmpeg(files: list[str], workers: int, command: Callable[[str, int], list[str]]) -> Cost:
    costs: list[Cost] = []
    with _measured(costs), ThreadPoolExecutor(workers) as pool:
        list(
            pool.map(
                lambda pair: subprocess.run(command(*pair), check=False, capture_output=True),
                [(file, n) for n, file in enumerate(files)],
            )
        )
    return costs[0]


def _packing(copy: Manifest, files: list[str], folder: str) -> Line:
    """Write one shard of kept files, in one process, beside `tar` and `sha256sum`."""
    by_id = {Path(f).name: f for f in files}
    entries = [
        Entry(
            n,
            n,
            Item(s.source_id, copy.classes[s.class_id], by_id[Path(s.source_id).name]),
            s.class_id,
            Outcome("kept", "", "", s.extension, s.size, s.crc32, s.frames, s.fps, s.duration, s.width, s.height),
            as_is=True,
        )
        for n, s in enumerate(copy.samples)
        if Path(s.source_id).name in by_id
    ]
    ours: list[Cost] = []
    other: list[Cost] = []
    names = "\n".join(e.source_url for e in entries)
    for turn in range(3):  # the first turn warms the page cache and imports for both
        with _measured(ours):
            write_shard(entries, 0, f"{folder}/packed", Staging(folder), f"ours-{turn}.tar")
        with _measured(other), _synced(f"{folder}/other-{turn}.tar") as target:
            subprocess.run(["tar", "-chPf", target, "-T", "-"], input=names.encode(), check=True, capture_output=True)
            subprocess.run(["sha256sum", target], check=True, capture_output=True)
    return Line(f"packing, {len(entries)} videos", _best(ours[1:]), "tar, sha256sum, fsync", _best(other[1:]), 0.7)


@contextmanager
def _synced(path: str) -> Iterator[str]:
    yield path
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _decoding(train: Manifest, out: str, files: list[str]) -> Line:
    """Clips of 32 frames of stride 2 from the middle: members of `train` shards beside the videos they came from."""
    by_name = {Path(f).name: f for f in files}
    pairs = [(s, by_name[Path(s.source_id).name]) for s in train.samples if Path(s.source_id).name in by_name]
    shards = {n: Path(out, shard.url).read_bytes() for n, shard in enumerate(train.shards)}
    ours = [shards[s.shard][s.offset : s.offset + s.size] for s, _ in pairs]
    theirs = [Path(file).read_bytes() for _, file in pairs]
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for turn in range(6):
        with _measured(costs[turn % 2]):
            for data in (ours, theirs)[turn % 2]:
                decode_clip(data)
    return Line(f"clips from shards, {len(pairs)} videos", _best(costs[0]), "clips from the originals", _best(costs[1]), 1.5)


def decode_clip(data: bytes) -> int:
    """Seek to the middle's key frame and decode a clip of 32 frames of stride 2, or what there is; returns frames."""
    with av.open(BytesIO(data)) as video:
        stream = video.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        frames = stream.frames or 64
        start = max(0, (frames - CLIP_FRAMES * CLIP_STRIDE) // 2)
        if start and stream.average_rate and stream.time_base:
            begin = int(start / stream.average_rate / stream.time_base) + (stream.start_time or 0)
            video.seek(begin, stream=stream)
        else:
            begin = 0
        later = (f for f in video.decode(stream) if f.pts is None or f.pts >= begin)
        wanted = itertools.islice(later, 0, CLIP_FRAMES * CLIP_STRIDE, CLIP_STRIDE)
        return sum(1 for _ in wanted)


def main(argv: Sequence[str]) -> int:
    """`jobs/benchmark.py prep SOURCE ...`: the comparisons for a source, which is given as to `data-prep shard`."""
    parser = argparse.ArgumentParser(prog="benchmark.py prep", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="SOURCE")
    for name, kind in KINDS.items():
        one = kinds.add_parser(name)
        kind.add_arguments(one)
        one.add_argument("--classes", metavar="FILE|MANIFEST", help="class names, where the source needs them")
        one.add_argument("--count", type=int, default=200, metavar="N", help="videos at most (%(default)s)")
        one.add_argument("--workers", type=int, metavar="N", help="processes on either side (the machine's cores)")
    arguments = parser.parse_args(argv)
    for line in measure(KINDS[arguments.kind].from_arguments(arguments), arguments.count, arguments.workers):
        print(line)
    if ffmpeg() is None:
        print("no ffmpeg on the path and no VSWIN_FFMPEG: not compared with it")
    return 0
