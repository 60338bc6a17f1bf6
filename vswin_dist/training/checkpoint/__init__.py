"""Portable checkpoints: what they hold, the folder of a training's, and the writing of them while it goes on.

`python -m vswin_dist.training.checkpoint list|verify|export ROOT` shows, reads and exports them. One that is damaged is
never deleted: it is set apart, as the folder `damaged-step-00000120-...`.
"""

from vswin_dist.training.checkpoint.files import (
    COMMIT,
    MODEL,
    Position,
    load_moments,
    load_weights,
    read_position,
    verify,
)
from vswin_dist.training.checkpoint.folder import (
    Found,
    begin,
    best,
    clean,
    in_use,
    keep_for_model,
    list_checkpoints,
    newest_whole,
    prune,
)
from vswin_dist.training.checkpoint.snapshot import Part, State
from vswin_dist.training.checkpoint.writer import CheckpointWriter, Saved

__all__ = [
    "COMMIT",
    "MODEL",
    "CheckpointWriter",
    "Found",
    "Part",
    "Position",
    "Saved",
    "State",
    "begin",
    "best",
    "clean",
    "in_use",
    "keep_for_model",
    "list_checkpoints",
    "load_moments",
    "load_weights",
    "newest_whole",
    "prune",
    "read_position",
    "verify",
]
