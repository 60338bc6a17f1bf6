"""What is exported: a model, its card, and the clips that it will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vswin_dist.errors import ConfigError
from vswin_dist.model_card import CARD, ModelCard
from vswin_dist.models import VideoSwin

TRACED, CHECKED = 2, (1, 3)  # clips in a batch of any size: as it is traced, and as it is checked


@dataclass(frozen=True)
class Clips:
    """The clips that an exported model takes: float32 [B, 3, T, H, W], normalised, of one T, H and W."""

    shape: tuple[int, int, int]  # T, H, W
    batch: int | None  # B; None: any number

    def __str__(self) -> str:
        return f"[{self.batch or 'B'}, 3, {', '.join(map(str, self.shape))}]"

    def draw(self, batch: int) -> Tensor:
        """Draw `batch` clips, always the same ones, distributed as normalised pixels are."""
        return torch.randn(batch, 3, *self.shape, generator=torch.Generator().manual_seed(0))

    def checked(self) -> tuple[int, ...]:
        """Say with how many clips in a batch the export is checked: of a batch of any size, others than were traced."""
        return CHECKED if self.batch is None else (self.batch,)


@dataclass(frozen=True)
class Subject:
    """A model to export."""

    reference: str  # models:/NAME/VERSION, or a folder or URL
    model: VideoSwin
    card: ModelCard
    clips: Clips
    facts: Mapping[str, str] = field(default_factory=dict)  # what the registry says of it, such as scores


def choose_clips(card: ModelCard, shape: tuple[int, int, int] | None, batch: int | None) -> Clips:
    """Choose the clips: of `shape` (frames, height, width), else those that the model was trained for.

    Raises:
        ConfigError: no shape is given, and the model was never trained.
    """
    if shape is None:
        frames, size = (card.preprocessing.get(name) for name in ("frames", "size"))
        if frames is None or size is None:
            raise ConfigError(f"the model's {CARD} does not say which clips it takes: give --clip FRAMES HEIGHT WIDTH")
        shape = (frames, size, size)
    return Clips(shape, batch)
