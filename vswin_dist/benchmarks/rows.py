"""What data_prep's driver takes for many rows: time and memory of listing, ordering, journaling and assembling them.

`python jobs/benchmark.py rows N [N ...]`: a csv index of N rows over N files of a file system that only names them.
Videos are not read: the driver is handed made-up outcomes, 1 in 50 of them a reject, and its worker writes the journal's
records without the tars; all else is what `data-prep shard csv` runs. Every N has a driver of its own. Seconds are those of
its processor, so that a loaded machine may be measured on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec

from data_prep import journal
from data_prep.encode import Outcome
from data_prep.executor import Done, Executor, LocalExecutor, Task
from data_prep.pack import PackTask, sample_key, shard_name
from data_prep.pipeline import shard_dataset
from data_prep.settings import Encoding, PrepSettings
from data_prep.sources.csv_index import CsvSource
from vswin_dist import local_files, storage
from vswin_dist.manifest import Sample, Shard

MB = 1e6
CLASSES = 400
SHARD_SAMPLES = 500
REJECTED = 50  # of so many videos, one


def file_name(number: int) -> str:
    """Name the file of a row as Kinetics names its own."""
    scattered = number * 0x9E3779B1 % 2**32
    return f"class name {number % CLASSES}/{scattered:011d}_000059_000069.mp4"


class NamesAlone(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system whose folder `names://N` holds N files in folders of classes; there is nothing in them."""

    protocol = "names"
    cachable = False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """List the classes of `N`, or the files of `N/CLASS`."""
        count, _, name = self._strip_protocol(path).partition("/")
        first, kind, step = (int(name.split()[-1]), "file", CLASSES) if name else (0, "directory", 1)
        last = int(count) if name else min(CLASSES, int(count))
        names = (file_name(n) if name else f"class name {n}" for n in range(first, last, step))
        found = [{"name": f"{count}/{n}", "size": 1, "type": kind} for n in names]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Say that everything is there."""
        return {"name": self._strip_protocol(path), "size": 0, "type": "directory"}


@dataclass(frozen=True)
class Phase:
    """Seconds of the processor that a part of the work took, and the most memory that the process has had until its end."""

    name: str
    seconds: float
    peak_mb: float


class MadeUp(Executor):
    """Gives made-up outcomes of videos, at once; the records of shards are written by a worker, without the tars."""

    def __init__(self) -> None:
        self._pool = LocalExecutor(1)
        self._videos: deque[Task] = deque()
        self.worked, self.peak_mb = 0.0, 0.0  # when the last shard was done, and the process's peak then

    @property
    def room(self) -> int:
        """See `Executor.room`."""
        return self._pool.room - len(self._videos)

    def submit(self, task: Task) -> None:
        """See `Executor.submit`."""
        if isinstance(task.argument, PackTask):
            self._pool.submit(Task(task.ticket, record, task.argument))
        else:
            self._videos.append(task)

    def wait(self) -> Done:
        """See `Executor.wait`."""
        if self._videos:
            task = self._videos.popleft()
            return Done(task.ticket, _outcome(task.ticket[1]) if isinstance(task.ticket, tuple) else [])
        done = self._pool.wait()
        self.worked, self.peak_mb = time.process_time(), _peak_mb()
        return done

    def close(self) -> None:
        """See `Executor.close`."""
        self._pool.close()


def _outcome(index: int) -> Outcome:
    if index % REJECTED == REJECTED - 1:
        return Outcome("truncated", "the index reaches to byte 1000, the file has 900")
    content = hashlib.blake2b(str(index).encode(), digest_size=16).hexdigest()
    return Outcome("kept", "", content, "mp4", 500_000 + index % 1000, index % 2**32, 300, 29.97, 10.01, 340, 256)


def record(task: PackTask) -> journal.ShardRecord:
    """Write the record of a shard as `pack` does."""
    kept = [entry for entry in task.entries if entry.outcome.kept]
    samples, offset = [], 0
    for e in kept:
        o, offset = e.outcome, offset + 1536
        facts = (o.size, o.crc32, o.extension, o.frames, o.fps, o.duration, o.width, o.height, e.item.source_id)
        samples.append(Sample(sample_key(e.item.source_id), e.class_id, task.number, offset, *facts))
        offset += o.size
    shard = Shard(shard_name(task.number), offset, hashlib.sha256(str(task.number).encode()).hexdigest(), len(kept))
    rejected = [entry.reject() for entry in task.entries if not entry.outcome.kept]
    contents = [entry.outcome.content for entry in kept]
    found = journal.ShardRecord(task.number, task.start, task.end, shard, samples, contents, rejected, [])
    storage.put_bytes(journal.record_url(task.out, task.start), found.to_json())
    return found


def write_index(count: int, path: Path) -> None:
    """Write the csv index of `count` rows, if it is not there."""
    if path.exists():
        return
    with local_files.write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("path,label\n")
        file.writelines(f"{file_name(n)},class name {n % CLASSES}\n" for n in range(count))


def drive(count: int, folder: str) -> list[Phase]:
    """Make a dataset of `count` made-up videos in `folder`, in this process; an earlier call that stopped is resumed."""
    fsspec.register_implementation("names", NamesAlone, clobber=True)
    phases, pools, began = [], [], time.process_time()

    def listed() -> Executor:
        phases.append(Phase("listing and ordering", time.process_time() - began, _peak_mb()))
        print(phases[0], file=sys.stderr, flush=True)  # the rest takes many minutes
        pools.append(MadeUp())
        return pools[0]

    shard_dataset(
        CsvSource(f"{folder}/index.csv", f"names://{count}", "path", "label", {}),
        f"{folder}/out",
        PrepSettings(Encoding(profile="copy"), shard_bytes=2**60, shard_count=SHARD_SAMPLES),
        executor=listed,
        show_progress=False,
    )
    ended = time.process_time()
    phases.append(Phase("results and records", pools[0].worked - began - phases[0].seconds, pools[0].peak_mb))
    phases.append(Phase("manifest and reports", ended - pools[0].worked, _peak_mb()))
    return phases


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def measure(count: int, folder: str) -> list[Phase]:
    """Run `drive` in a process of its own."""
    write_index(count, Path(folder, "index.csv"))
    code = (
        "import json, sys; from dataclasses import asdict; from vswin_dist.benchmarks.rows import drive; "
        "print(json.dumps([asdict(p) for p in drive(int(sys.argv[1]), sys.argv[2])]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(count), folder], stdout=subprocess.PIPE, text=True, check=True)
    return [Phase(**phase) for phase in json.loads(done.stdout)]


def main(arguments: list[str] | None = None) -> int:
    """Command line: print what was measured, then the JSON."""
    parser = argparse.ArgumentParser(prog="benchmark.py rows", description=__doc__)
    parser.add_argument("rows", type=int, nargs="+", metavar="N", help="rows of an index")
    parser.add_argument("--folder", metavar="DIR", help="kept, so that a run which was stopped resumes (a temporary one)")
    args = parser.parse_args(arguments)
    results: dict[int, list[Phase]] = {}
    for count in args.rows:
        with tempfile.TemporaryDirectory() as temporary:
            folder = f"{args.folder or temporary}/{count}"
            Path(folder).mkdir(parents=True, exist_ok=True)
            results[count] = measure(count, folder)
        for phase in results[count]:
            print(f"{count:,} rows, {phase.name}: {phase.seconds:.1f} s, peak so far {phase.peak_mb:.0f} MB", flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"machine": machine, "rows": {n: [asdict(p) for p in found] for n, found in results.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
