"""The files of one checkpoint, on any fsspec URL: tensors by parameter name in safetensors, everything else in JSON.

A checkpoint is the folder `step-00000120` with `model.safetensors`, `model.json` (together what
`vswin_dist.serving` loads and the registry registers), the moments in a file of each rank that wrote some of them, and,
written last, `checkpoint.json` with the size and sha256 of the others: a folder without it is not a checkpoint. Nothing
that is read depends on the number of ranks or the ZeRO stage, and nothing is unpickled.

Each submission of a run has a number (`vswin_dist/lease.py`), and from the second on its checkpoints carry it, as
`step-00000120-0002` does: no late write of one that was cut off meets the files of the one that took over.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vswin_dist import storage
from vswin_dist.errors import CheckpointError
from vswin_dist.model_card import WEIGHTS
from vswin_dist.records import parse_record
from vswin_dist.training.checkpoint.snapshot import assemble

MODEL = WEIGHTS
MOMENTS, COMMIT = "optimizer", "checkpoint.json"  # how the names of the moments' files begin; written last
FORMAT, VERSION = "vswin-checkpoint", 3
VERSIONS = (1, 2, VERSION)  # that are read; 1 has one file of moments, 1 and 2 no sha256 of the commit file itself
STEP, SCRATCH, DAMAGED = "step-", "vswin-checkpoint-", "damaged-"  # how the names below a root begin


@dataclass(frozen=True)
class Position:
    """Where a training run stands, and what it is. `step` optimizer steps are done."""

    step: int
    epoch: int
    samples_into_epoch: int
    run_id: str
    fingerprint: str  # of the training set
    settings: dict[str, Any]
    groups: list[dict[str, Any]]  # hyperparameters of each parameter group
    data: dict[str, Any]  # the loader's state: the next step, and what the order of samples depends on
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation at this step, if there was one
    skipped_steps: int = 0  # of the steps done, those that changed no weight
    skipped_in_row: int = 0  # of them, the last ones
    loss_scale: dict[str, float] = field(default_factory=dict)  # of fp16: the scale, and the steps since it was lowered
    best_top1: float | None = None  # of the evaluations so far
    evaluations_since_best: int = 0


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint, as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """What `checkpoint.json` holds."""

    position: Position
    files: dict[str, Written]
    sha256: str = ""  # of all else in it


def folder_name(step: int, number: int) -> str:
    """Name the folder of the checkpoint of `step` that submission `number` writes."""
    return f"{STEP}{step:08d}" + (f"-{number:04d}" if number > 1 else "")


def moments_file(rank: int) -> str:
    """Name the file of the moments that `rank` writes."""
    return f"{MOMENTS}-{rank:05d}.safetensors"


def write(url: str, name: str, content: bytes | memoryview) -> Written:
    """Write a file of the checkpoint at `url`; its sha256 is taken from memory, meanwhile."""
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(hashlib.sha256, content)
        storage.put_bytes(storage.join(url, name), content)
        return Written(len(content), digest.result().hexdigest())


def commit(url: str, position: Position, files: Mapping[str, Written]) -> None:
    """Make a checkpoint of the files at `url`, once all of them are there as they were written.

    Raises:
        StorageError: one is not.
    """

    def check() -> None:
        sizes = storage.list_sizes(url)
        if absent := {name: sizes.get(name) for name, f in files.items() if sizes.get(name) != f.bytes}:
            raise OSError(f"not as they were written: {absent} (bytes). Every node must reach this place")

    storage.with_retry(check, url)  # another node's file may show late
    body = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **asdict(Commit(position, dict(files)))}))
    body["sha256"] = _sha256_of_commit(body)
    storage.put_bytes(storage.join(url, COMMIT), json.dumps(body, indent=1).encode())


def _sha256_of_commit(body: dict[str, Any]) -> str:
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_position(url: str) -> Position:
    """Read the commit file of the checkpoint at `url`; its files' sizes are checked.

    Raises:
        CheckpointError: not a whole checkpoint.
    """
    found, sizes = read_commit(url), storage.list_sizes(url)
    for name, expected in found.files.items():
        if name not in sizes:
            raise CheckpointError(f"{url} is not a whole checkpoint: {name} does not exist")
        if sizes[name] != expected.bytes:
            raise CheckpointError(f"{url}/{name} has {sizes[name]} bytes, expected {expected.bytes}")
    return found.position


def read_commit(url: str) -> Commit:
    """Read the commit file of the checkpoint at `url`.

    Raises:
        CheckpointError: it is absent, not valid, or not what was written.
    """
    place = storage.join(url, COMMIT)
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url} is not a whole checkpoint: {error}") from error
    found = parse_record(data, place, Commit, format=FORMAT, version=VERSIONS, what="checkpoint", error=CheckpointError)
    if found.sha256 and found.sha256 != (sha256 := _sha256_of_commit(json.loads(data))):
        raise CheckpointError(f"{place} is damaged: sha256 {sha256[:12]}..., expected {found.sha256[:12]}...")
    return found


def verify(url: str) -> Position:
    """Read the checkpoint at `url` wholly, and return its position.

    Raises:
        CheckpointError: a file is absent, or is not what was written; names it.
    """
    position = read_position(url)
    for name in read_commit(url).files:
        with fetched(url, name):
            pass
    return position


def load_weights(url: str) -> dict[str, Tensor]:
    """Load the weights of the checkpoint at `url` to the CPU, fp32 by parameter name.

    Raises:
        CheckpointError: the content is not what was written.
    """
    with fetched(url, MODEL) as [path]:
        return dict(load_file(path))


def load_moments(url: str) -> dict[str, Tensor]:
    """Load the moments of the checkpoint at `url` to the CPU, as "exp_avg.NAME" and "exp_avg_sq.NAME".

    Raises:
        CheckpointError: the content is not what was written.
    """
    with fetched(url, *(name for name in read_commit(url).files if name.startswith(MOMENTS))) as paths:
        return assemble(paths)


@contextmanager
def fetched(url: str, *names: str) -> Iterator[list[Path]]:
    """Yield files of the checkpoint at `url`, each of the sha256 of what was written: copies of those of object storage.

    Raises:
        CheckpointError: another was read.
    """
    written = read_commit(url).files
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        here = storage.is_local(url)  # as a file system that nodes share
        paths = [Path(storage.absolute(url) if here else folder) / name for name in names]
        for name, path in zip(names, paths, strict=True):
            if not here:
                storage.get_file(storage.join(url, name), path)
            sha256, expected = _sha256(path), written[name].sha256
            if sha256 != expected:
                raise CheckpointError(f"{url}/{name} is damaged: sha256 {sha256[:12]}..., expected {expected[:12]}...")
        yield paths


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
