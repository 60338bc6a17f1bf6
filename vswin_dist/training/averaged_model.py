"""The portable model of a checkpoint's averaged weights (EMA)."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import save_file

from vswin_dist import storage
from vswin_dist.model_card import CARD, WEIGHTS
from vswin_dist.training import checkpoint
from vswin_dist.training.engine import EMA


def export(url: str) -> str:
    """Write the portable model beside the checkpoint at `url`, as `ema-step-...`, and return its URL.

    Parameters that were never updated have no average: it is what they are.

    Raises:
        CheckpointError: the checkpoint is not what was written.
    """
    root, _, name = url.rpartition("/")
    target = storage.join(root, f"{EMA}-{name}")
    weights = checkpoint.load_weights(url)
    averages = checkpoint.load_moments(url)
    with tempfile.TemporaryDirectory(prefix="vswin-average-") as folder:
        local = Path(folder) / WEIGHTS
        save_file({n: averages.get(f"{EMA}.{n}", w) for n, w in weights.items()}, local)
        storage.put_file(local, storage.join(target, WEIGHTS))
    storage.put_bytes(storage.join(target, CARD), storage.read_bytes(storage.join(url, CARD)))
    return target
