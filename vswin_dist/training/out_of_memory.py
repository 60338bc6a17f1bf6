"""Say what would fit where a device has run out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vswin_dist.config import Settings
from vswin_dist.device import Rank
from vswin_dist.errors import WorkFailed
from vswin_dist.planning.memory import nearest_that_fit, predict
from vswin_dist.training.initial_model import architecture_of
from vswin_dist.training.node_checks import setup_of


@contextmanager
def explained(settings: Settings, num_classes: int, rank: Rank) -> Iterator[None]:
    """Name the settings that would fit where the block runs out of a device's memory.

    Raises:
        WorkFailed: for torch.OutOfMemoryError; another attempt would meet it too.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        setup = setup_of(settings, rank.world_size)
        architecture = architecture_of(settings, num_classes)
        have = torch.cuda.mem_get_info(rank.device)[1]
        # What is predicted for these settings did not fit, whatever the prediction says: less must do.
        limit = min(have, predict(architecture, setup).total - 1)
        fits = nearest_that_fit(architecture, setup, limit, settings.training.global_batch // rank.world_size)
        remedy = f"By prediction {' or '.join(fits)} fits" if fits else "No smaller micro-batch fits by prediction"
        raise WorkFailed(f"rank {rank.rank} ran out of the memory of {rank.device}: {error}. {remedy}.") from error
