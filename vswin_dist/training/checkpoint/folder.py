"""The checkpoints of a training, in one folder: the newest whole one, the best, those that stay.

An empty file `began-0002-00000100` says that the second submission of the run went on from step 100: what the first
commits beyond that is no checkpoint.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from vswin_dist import storage
from vswin_dist.errors import CheckpointError, StorageError
from vswin_dist.lease import UNFENCED, Fence
from vswin_dist.training.checkpoint.files import (
    COMMIT,
    DAMAGED,
    FORMAT,
    SCRATCH,
    STEP,
    VERSIONS,
    Position,
    read_position,
    verify,
)

REGISTERED, LOADING = "registered", "loading-"  # files in the folder of a checkpoint that keep it
LOADED_WITHIN_S = 24 * 3600.0  # a reader that was killed keeps it no longer
_NAME = re.compile(r"step-(?P<step>\d{8})(?:-(?P<number>\d{4,}))?")
_BEGAN = re.compile(r"began-(?P<number>\d{4,})-(?P<step>\d{8})")


@dataclass(frozen=True)
class Found:
    """A committed checkpoint."""

    url: str
    position: Position


def list_checkpoints(root: str, verbose: bool = True) -> list[Found]:
    """List the whole checkpoints below `root`, oldest first; others are skipped, and with `verbose` a line says why."""
    found = []
    for name in _step_names(root):
        url = storage.join(root, name)
        try:
            found.append(Found(url, read_position(url)))
        except CheckpointError as error:
            if verbose:
                print(f"skipping checkpoint: {error}", flush=True)
    return sorted(found, key=lambda f: f.position.step)


def _step_names(root: str) -> list[str]:
    """Names of the folders of checkpoints below `root`, sorted; without those that a cut-off submission wrote too late."""
    names = storage.list_names(root)
    began = [(int(m["number"]), int(m["step"])) for n in names if (m := _BEGAN.fullmatch(n))]

    def counts(name: str) -> bool:
        match = _NAME.fullmatch(name)
        return not match or all(number <= int(match["number"] or 1) or int(match["step"]) <= step for number, step in began)

    return sorted(n for n in names if n.startswith(STEP) and counts(n))


def begin(root: str, step: int, fence: Fence) -> None:
    """Note that the submission of `fence` goes on from `step`, the first time that it does; for one rank."""
    mine = f"began-{fence.number:04d}-"
    if fence.number and not any(name.startswith(mine) for name in storage.list_names(root)):
        storage.put_bytes(storage.join(root, f"{mine}{step:08d}"), b"")


def newest_whole(root: str) -> Found | None:
    """Find the newest checkpoint below `root` whose files are what was written, every byte of them; for one rank.

    A damaged one is set apart, with a line that names it, and the one before it is taken. What has no commit file is none:
    the last bytes of a killed writer may arrive after `clean`.

    Raises:
        CheckpointError: the newest is of another version of the format.
        StorageError: one cannot be read: it may be whole.
    """
    for name in reversed(_step_names(root)):
        url = storage.join(root, name)
        try:
            return Found(url, verify(url))
        except CheckpointError as error:
            if not storage.exists(storage.join(url, COMMIT)):
                continue
            if _is_of_another_version(url):
                raise
            apart = storage.join(root, f"{DAMAGED}{name}-{uuid.uuid4().hex[:8]}")
            storage.move(url, apart)
            print(f"passing over a damaged checkpoint, kept as {apart}: {error}", flush=True)
    return None


def _is_of_another_version(url: str) -> bool:
    try:
        body = json.loads(storage.read_bytes(storage.join(url, COMMIT)))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(body, dict) and body.get("format") == FORMAT and body.get("version") not in VERSIONS


def clean(root: str) -> None:
    """Remove what a killed writer or `prune` has left below `root`; for one rank, before anything is saved there.

    A committed checkpoint stays, damaged or not.
    """
    for name in storage.list_names(root):
        url = storage.join(root, name)
        if name.startswith(SCRATCH) or (name.startswith(STEP) and not storage.exists(storage.join(url, COMMIT))):
            storage.remove(url, recursive=True)


def best(found: list[Found]) -> Found | None:
    """Choose the checkpoint with the highest top-1 (the newest of equals); the newest where none was evaluated."""
    evaluated = [f for f in found if "val/top1" in f.position.metrics]
    if not evaluated:
        return found[-1] if found else None
    return max(evaluated, key=lambda f: (f.position.metrics["val/top1"], f.position.step))


def prune(root: str, keep: int, fence: Fence = UNFENCED) -> None:
    """Remove all but the `keep` newest checkpoints, the best, those that a registered model points to, and those in use.

    One that is not committed yet is none of them, and stays.

    Raises:
        FencedOut: another submission has taken over.
    """
    found = list_checkpoints(root, verbose=False)
    kept = {f.url for f in found[-keep:]} | {f.url for f in [best(found)] if f}
    for f in found:
        if f.url not in kept and not _is_needed(f.url):
            fence.check()
            storage.remove(storage.join(f.url, COMMIT))  # first, so that a half-removed one is none
            storage.remove(f.url, recursive=True)


def _is_needed(url: str) -> bool:
    names = storage.list_names(url)
    begun = [float(name.removeprefix(LOADING).partition("-")[0]) for name in names if name.startswith(LOADING)]
    return REGISTERED in names or any(time.time() - at < LOADED_WITHIN_S for at in begun)


def keep_for_model(url: str, name: str) -> None:
    """Keep the checkpoint at `url` from now on: a version of the registered model `name` is to point to its files."""
    storage.put_bytes(storage.join(url, REGISTERED), name.encode())


def model_of(url: str) -> str | None:
    """Return the name of the registered model for which the checkpoint at `url` is kept."""
    place = storage.join(url, REGISTERED)
    return storage.read_bytes(place).decode() if storage.exists(place) else None


@contextmanager
def in_use(url: str) -> Iterator[None]:
    """Keep the checkpoint at `url` while the block loads it; a place that cannot be written is not pruned either."""
    mark = storage.join(url, f"{LOADING}{time.time():.0f}-{uuid.uuid4().hex}")
    with suppress(StorageError):
        storage.put_bytes(mark, b"")
    try:
        yield
    finally:
        with suppress(StorageError):
            storage.remove(mark)
