"""The model as `torch.export` can trace it: clips of one shape, any number of them.

`VideoSwin` looks its geometries up by the number of clips, as a Python integer. Here those of one clip are constants of
the graph, and the graph computes from them where the tokens of B clips lie.

Shapes: B = clips; N = tokens of a clip; L = tokens of a window; nW = windows of a clip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vswin_dist.models.swin.model import VideoSwin
from vswin_dist.models.swin.windows import BatchGeometry, Rows, Triple


class TracedGeometry(BatchGeometry):
    """A geometry of B clips, all that the plain attention reads of it, of tensors that belong to a graph."""

    def __init__(self, one: OneClip, batch: int) -> None:
        self.grid, self.tokens, self.length, self.batch = one.grid, one.tokens, one.length, batch
        clip = torch.arange(batch, device=one.index.device)[:, None]
        self.gather = (one.gather.view(-1, 1, one.length) + clip * one.tokens).reshape(-1)
        self.scatter = self._places(one.scatter, clip)
        self.padding = None if one.padding is None else self._places(one.padding, clip)
        self.index = one.index
        self.rows = tuple(Rows(start * batch, stop * batch, mask) for start, stop, mask in one.rows())

    def _places(self, of_one: Tensor, clip: Tensor) -> Tensor:
        """Find in the windows of all clips what lies at `of_one` in those of one: windows come first, then clips."""
        window, token = of_one // self.length, of_one % self.length
        return ((window * self.batch + clip) * self.length + token).reshape(-1)


class OneClip(nn.Module):
    """The geometry of one clip, as buffers."""

    gather: Tensor
    scatter: Tensor
    padding: Tensor | None
    index: Tensor

    def __init__(self, geometry: BatchGeometry) -> None:
        super().__init__()
        self.grid, self.tokens, self.length = geometry.grid, geometry.tokens, geometry.length
        for name in ("gather", "scatter", "padding", "index"):
            self.register_buffer(name, getattr(geometry, name))
        self._windows = [(part.start, part.stop) for part in geometry.rows]
        for number, part in enumerate(geometry.rows):
            self.register_buffer(f"mask{number}", part.mask)

    def rows(self) -> list[tuple[int, int, Tensor | None]]:
        """Return the windows of each mask pattern, and its mask."""
        return [(start, stop, getattr(self, f"mask{number}")) for number, (start, stop) in enumerate(self._windows)]


class Traceable(nn.Module):
    """A model in evaluation for clips of one shape, in which nothing depends on values or on what was computed before."""

    def __init__(self, model: VideoSwin, clip: Triple) -> None:
        """`clip` is the frames, height and width of the clips.

        Raises:
            ConfigError: clips that the model does not take.
        """
        super().__init__()
        self.model = model.eval()
        weight = model.head.weight
        example = torch.zeros(1, 3, *clip, dtype=weight.dtype, device=weight.device)
        model._check_clips(example)
        geometries = model._geometries(example)
        kept = list({id(geometry): geometry for stage in geometries for geometry in stage}.values())
        self.geometries = nn.ModuleList(OneClip(geometry) for geometry in kept)
        self._numbers = [[kept.index(geometry) for geometry in stage] for stage in geometries]

    def forward(self, clips: Tensor) -> Tensor:
        """Classify clips float [B, 3, T, H, W] -> logits [B, num_classes]."""
        made = [TracedGeometry(one, clips.shape[0]) for one in self.geometries if isinstance(one, OneClip)]
        geometries: list[list[BatchGeometry]] = [[made[number] for number in stage] for stage in self._numbers]
        logits: Tensor = self.model.head(self.model._compute(clips, None, geometries).mean(1))
        return logits
