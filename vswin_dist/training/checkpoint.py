"""Portable checkpoints: tensors by parameter name in safetensors, everything else in JSON, on any fsspec URL.

A checkpoint is the folder ``step-00000120`` with ``model.safetensors``, ``model.json`` (together what
`vswin_dist.serving` loads and the registry registers), ``optimizer.safetensors`` and, written last,
``checkpoint.json`` with the size and sha256 of the others: a folder without it is not a checkpoint. Nothing depends
on the number of ranks or the ZeRO stage, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vswin_dist import storage
from vswin_dist.errors import CheckpointError
from vswin_dist.serving.export import ModelCard, card_bytes
from vswin_dist.tracking.registry import MODEL_FILES

MODEL, CARD = MODEL_FILES
OPTIMIZER, COMMIT = "optimizer.safetensors", "checkpoint.json"
STEP, SCRATCH = "step-", "vswin-checkpoint-"  # how the names below a root begin


@dataclass(frozen=True)
class Position:
    """Where a training stands, and what it is. `step` optimizer steps are done."""

    step: int
    epoch: int
    samples_into_epoch: int
    run_id: str
    fingerprint: str  # of the training set
    settings: dict[str, Any]
    groups: list[dict[str, Any]]  # hyperparameters of each parameter group
    data: dict[str, Any]  # the loader's state: the next step, and what the order of samples depends on
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation at this step, if there was one


@dataclass(frozen=True)
class Found:
    """A committed checkpoint."""

    url: str
    position: Position


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(root: str, position: Position, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor],
         card: ModelCard) -> str:
    """Write the checkpoint of `position` below `root`; called by one rank. Returns its URL."""
    url = storage.join(root, f"{STEP}{position.step:08d}")
    files = {}
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=_scratch(root)) as folder:
        for name in (MODEL, OPTIMIZER, CARD):
            local = Path(folder) / name
            if name == CARD:
                local.write_bytes(card_bytes(card))
            else:
                save_file(dict(weights if name == MODEL else moments), local)
            files[name] = {"bytes": local.stat().st_size, "sha256": _sha256(local)}
            storage.put_file(local, storage.join(url, name))
    body = {"format": "vswin-checkpoint", "version": 1, "position": asdict(position), "files": files}
    storage.put_bytes(storage.join(url, COMMIT), json.dumps(body, indent=1).encode())
    return url


def _scratch(root: str) -> str | None:
    """Where to write before the put: beside the target where that is local."""
    if not storage.is_local(root):
        return None
    Path(root).mkdir(parents=True, exist_ok=True)
    return root


def read_position(url: str) -> Position:
    """The commit file of the checkpoint at `url`, its files' sizes checked.

    Raises:
        CheckpointError: not a whole checkpoint.
    """
    try:
        body = json.loads(storage.read_bytes(storage.join(url, COMMIT)))
        for name, expected in body["files"].items():
            found = storage.size(storage.join(url, name))
            if found != expected["bytes"]:
                raise CheckpointError(f"{url}/{name} has {found} bytes, expected {expected['bytes']}")
        return Position(**body["position"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{url} is not a whole checkpoint: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{url}/{COMMIT} cannot be read: {error}") from error


def list_checkpoints(root: str, tell: bool = True) -> list[Found]:
    """All whole checkpoints below `root`, oldest first; others are passed over, and with `tell` a line says why."""
    found = []
    for name in storage.list_names(root):
        if name.startswith(STEP):
            url = storage.join(root, name)
            try:
                found.append(Found(url, read_position(url)))
            except CheckpointError as error:
                if tell:
                    print(f"passed over: {error}", flush=True)
    return sorted(found, key=lambda f: f.position.step)


def clean(root: str) -> None:
    """Remove what a killed `save` or `prune` has left below `root`; for one rank, before anything is saved there.

    A committed checkpoint stays, damaged or not.
    """
    for name in storage.list_names(root):
        url = storage.join(root, name)
        if name.startswith(SCRATCH) or (name.startswith(STEP) and not storage.exists(storage.join(url, COMMIT))):
            storage.remove(url, recursive=True)


def load_tensors(url: str, name: str) -> dict[str, Tensor]:
    """The tensors of one file of the checkpoint at `url`, on the CPU, its sha256 checked.

    Raises:
        CheckpointError: the content is not what was written.
    """
    body = json.loads(storage.read_bytes(storage.join(url, COMMIT)))
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder:
        local = Path(folder) / name
        storage.get_file(storage.join(url, name), local)
        if (sha256 := _sha256(local)) != body["files"][name]["sha256"]:
            raise CheckpointError(f"{url}/{name} is damaged: sha256 {sha256[:12]}..., "
                                  f"expected {body['files'][name]['sha256'][:12]}...")
        return dict(load_file(local))


def best(found: list[Found]) -> Found | None:
    """The checkpoint with the highest top-1 (the newest of equals); the newest where none was evaluated."""
    evaluated = [f for f in found if "val/top1" in f.position.metrics]
    if not evaluated:
        return found[-1] if found else None
    return max(evaluated, key=lambda f: (f.position.metrics["val/top1"], f.position.step))


def prune(root: str, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the best."""
    found = list_checkpoints(root, tell=False)
    kept = {f.url for f in found[-keep:]} | {f.url for f in [best(found)] if f}
    for f in found:
        if f.url not in kept:
            storage.remove(storage.join(f.url, COMMIT))  # first, so that a half-removed one is none
            storage.remove(f.url, recursive=True)
