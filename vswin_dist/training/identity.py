"""Which training a submission means: a new one, one to resume, or one that is done.

``run.json`` in ``ROOT/RUN`` holds the MLflow run, the settings and the state of the newest training of that name;
its checkpoints stand in ``ROOT/RUN/RUN_ID``, so that a fresh start leaves the earlier ones alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from vswin_dist import storage
from vswin_dist.config import Settings, to_flat
from vswin_dist.errors import ConfigError

FILE = "run.json"
# What may differ when a training goes on. Everything else makes it another training.
FREE = {
    "run.fresh", "data.train", "data.val", "data.workers", "data.prefetch", "data.cache_gb", "data.max_bad_samples",
    "model.init", "model.gradient_checkpointing", "model.compile", "model.attention_kernel", "training.workers",
    "training.min_workers", "training.use_gpu", "training.cpus_per_worker", "training.micro_batch", "training.zero_stage",
    "training.deterministic", "training.max_steps", "training.checkpoint_every", "training.keep_checkpoints",
    "training.max_failures",
}
FREE_GROUPS = ("evaluation.", "tracking.", "storage.")


@dataclass(frozen=True)
class Identity:
    """The newest training of a name."""

    run_id: str
    fingerprint: str
    settings: dict[str, Any]
    finished: bool
    step: int  # steps done where finished


def runs_root(s: Settings) -> str:
    """Where the trainings of this user stand: `storage.root`, else ``runs`` in the data root."""
    return storage.absolute(s.storage.root) if s.storage.root else str(storage.home() / "runs")


def read_identity(root: str) -> Identity | None:
    """The newest training below ``ROOT/RUN`` = `root`; None where there is none."""
    try:
        return Identity(**json.loads(storage.read_bytes(storage.join(root, FILE))))
    except FileNotFoundError:
        return None


def write_identity(root: str, identity: Identity) -> None:
    """Put `identity` at `root`."""
    storage.put_bytes(storage.join(root, FILE), json.dumps(asdict(identity), indent=1).encode())


def to_resume(s: Settings, root: str, fingerprint: str, total_steps: int) -> Identity | None:
    """The training that this submission continues, or None for a new one.

    Raises:
        ConfigError: it is finished, or other settings or data are asked for than it was begun with.
    """
    known = None if s.run.fresh else read_identity(root)
    if known is None:
        return None
    if known.finished and known.step >= min(total_steps, s.training.max_steps or total_steps):
        raise ConfigError(f"the training {s.run.name!r} is finished (MLflow run {known.run_id}, {known.step} steps): "
                          "give run.fresh=true to train again, or another run.name")
    check_same(known, s, fingerprint)
    return known


def check_same(known: Identity, s: Settings, fingerprint: str) -> None:
    """Refuse to take `s` on the data `fingerprint` for the training `known`.

    Raises:
        ConfigError: it was begun with other settings or data.
    """
    if known.fingerprint != fingerprint:
        raise ConfigError(f"the training {s.run.name!r} was begun on data {known.fingerprint}, {s.data.train} is "
                          f"{fingerprint}: give another run.name, or run.fresh=true")
    asked = to_flat(s)
    differing = [f"{k}: {known.settings.get(k)!r} -> {v!r}" for k, v in asked.items()
                 if k not in FREE and not k.startswith(FREE_GROUPS) and known.settings.get(k) != v]
    if differing:
        raise ConfigError(f"the training {s.run.name!r} was begun with other settings ({'; '.join(differing)}): "
                          "give another run.name, or run.fresh=true")
