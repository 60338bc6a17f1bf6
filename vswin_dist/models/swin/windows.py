"""Where the windows lie: one geometry for each token grid, with every permutation and mask region that it needs.

Shapes: T, H, W = extent of the token grid; N = T*H*W tokens; L = tokens of one window; nW = windows.
Source: Video Swin paper, section 3.2 (3D shifted windows) and the published code for padding and clamping.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]

MASK_VALUE = -100.0  # between regions of a shifted window, as published


@dataclass(frozen=True)
class MaskPattern:
    """Windows `start` to `stop` of a geometry, which all have the same regions.

    `cut` says for each axis where, inside the window, a second region starts; 0 where there is only one.
    """

    start: int
    stop: int
    cut: Triple


class WindowGeometry:
    """Partition, shift and padding of one grid as a single permutation and its inverse.

    Windows are ordered so that those with equal masks are neighbours: at most eight patterns, each a slice.
    """

    def __init__(self, grid: Triple, window: Triple, shift: Triple) -> None:
        self.grid = grid
        self.window, self.shift = clamp(grid, window, shift)
        self.padded: Triple = tuple(-(-n // w) * w for n, w in zip(grid, self.window, strict=True))  # type: ignore[assignment]
        self.tokens = grid[0] * grid[1] * grid[2]
        self.length = self.window[0] * self.window[1] * self.window[2]
        self.windows = self.padded[0] * self.padded[1] * self.padded[2] // self.length
        self.has_padding = self.padded != grid
        self.gather, self.patterns = self._order()

    def _order(self) -> tuple[Tensor, tuple[MaskPattern, ...]]:
        """Token at each position of each window (N = padding): int64 [nW, L], and the patterns of its rows."""
        axes = []
        for n, p, s in zip(self.grid, self.padded, self.shift, strict=True):
            position = (torch.arange(p) + s) % p  # the shifted grid reads `s` further on
            axes.append(torch.where(position < n, position, -1))
        t, h, w = torch.meshgrid(*axes, indexing="ij")
        token = (t * self.grid[1] + h) * self.grid[2] + w
        token[(t < 0) | (h < 0) | (w < 0)] = self.tokens
        counts = [p // w for p, w in zip(self.padded, self.window, strict=True)]
        split = [size for pair in zip(counts, self.window, strict=True) for size in pair]
        rows = token.view(split).permute(0, 2, 4, 1, 3, 5).reshape(self.windows, self.length)
        # Only the last window along a shifted axis holds two regions.
        last = [(torch.arange(c) == c - 1) & (s > 0) for c, s in zip(counts, self.shift, strict=True)]
        a, b, c = torch.meshgrid(*last, indexing="ij")
        code = (a.long() * 4 + b.long() * 2 + c.long()).reshape(-1)
        order = torch.argsort(code, stable=True)
        patterns, start = [], 0
        for value, count in zip(*torch.unique(code, return_counts=True), strict=True):
            bits = (int(value) >> 2 & 1, int(value) >> 1 & 1, int(value) & 1)
            cut = tuple((w - s) * bit for w, s, bit in zip(self.window, self.shift, bits, strict=True))
            patterns.append(MaskPattern(start, start + int(count), cut))  # type: ignore[arg-type]
            start += int(count)
        return rows[order], tuple(patterns)


@dataclass(frozen=True)
class Rows:
    """Windows `start` to `stop` of a batch and their additive mask [L, L] (None: nothing is masked)."""

    start: int
    stop: int
    mask: Tensor | None


class BatchGeometry:
    """All that a block needs to know of a grid, for a batch of B clips on one device.

    `gather`: int64 [nW*B*L], row of the flat [B*N] tokens for each position, windows first, then clips;
    a position of padding names row 0 and is listed in `padding` (None where there is none).
    `scatter`: int64 [B*N], its inverse. `index`: rows of the bias table, int64 [L*L], see `bias_index`.
    `rows`: the windows by mask pattern, at most eight, neighbours each. The same for the Triton kernels:
    `codes`: bfloat16 [patterns, L, 16], 1 at twice its region and next to it; `pattern`: int32 [nW*B], of each window.
    """

    def __init__(self, windows: WindowGeometry, index: Tensor, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.grid, self.tokens, self.length, self.batch = windows.grid, windows.tokens, windows.length, batch
        self.index = index
        rows = windows.gather[:, None, :]  # [nW, 1, L]
        real = rows < windows.tokens
        full = torch.where(real, rows + torch.arange(batch)[:, None] * windows.tokens, -1).reshape(-1)
        inverse = torch.empty(batch * windows.tokens, dtype=torch.int64)
        filled = torch.nonzero(full >= 0).squeeze(1)
        inverse[full[filled]] = filled
        padding = torch.nonzero(full < 0).squeeze(1)
        self.gather = full.clamp(min=0).to(device)
        self.scatter = inverse.to(device)
        self.padding: Tensor | None = padding.to(device) if windows.has_padding else None
        masks = [region_mask(windows.window, p.cut, device, dtype) if any(p.cut) else None for p in windows.patterns]
        self.rows = tuple(
            Rows(p.start * batch, p.stop * batch, mask) for p, mask in zip(windows.patterns, masks, strict=True)
        )
        sizes = torch.tensor([part.stop - part.start for part in self.rows])
        self.pattern = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes).to(device)
        region = torch.stack([regions(windows.window, p.cut) for p in windows.patterns])
        self.codes = F.one_hot(region, 8).repeat_interleave(2, 2).to(device, torch.bfloat16)

    def masked(self, bias: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield start and stop of each pattern's windows, and their bias [h, L, L] with the mask added."""
        for part in self.rows:
            yield part.start, part.stop, bias if part.mask is None else bias + part.mask


@contextmanager
def _plain_cpu() -> Iterator[None]:
    """Make the cached tensors on the CPU, usable in training even if first asked for in inference mode."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def clamp(grid: Triple, window: Triple, shift: Triple) -> tuple[Triple, Triple]:
    """Clamp window and shift to a grid: a window axis that is not smaller than the grid's becomes it, unshifted."""
    used = tuple(min(n, w) for n, w in zip(grid, window, strict=True))
    moved = tuple(0 if n <= w else s for n, w, s in zip(grid, window, shift, strict=True))
    return used, moved  # type: ignore[return-value]


@lru_cache(maxsize=256)
def window_geometry(grid: Triple, window: Triple, shift: Triple) -> WindowGeometry:
    """Return the geometry of a grid, cached; `window` and `shift` are the configured ones, clamped here."""
    with _plain_cpu():
        return WindowGeometry(grid, window, shift)


@lru_cache(maxsize=256)
def batch_geometry(
    grid: Triple, window: Triple, shift: Triple, indexing: str, batch: int, device: torch.device, dtype: torch.dtype
) -> BatchGeometry:
    """Return the geometry of a grid for B clips, cached, so that a steady step copies nothing to the device.

    `window`, `shift` and `indexing` are the configured ones; `device` and `dtype` those of the bias table.
    """
    with _plain_cpu():
        windows = window_geometry(grid, window, shift)
        return BatchGeometry(windows, bias_index(window, windows.window, indexing, device), batch, device, dtype)


def regions(window: Triple, cut: Triple) -> Tensor:
    """Label the region that each token of a window lies in, 0 to 7, by where the axes are cut: int64 [L]."""
    sides = [(torch.arange(w) >= c) & (c > 0) for w, c in zip(window, cut, strict=True)]
    a, b, c = torch.meshgrid(*sides, indexing="ij")
    return (a.long() * 4 + b.long() * 2 + c.long()).reshape(-1)


@lru_cache(maxsize=256)
def region_mask(window: Triple, cut: Triple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make the additive mask of one pattern, [L, L]: 0 within a region, `MASK_VALUE` between regions."""
    with _plain_cpu():
        region = regions(window, cut)
        mask = (region[:, None] != region[None, :]).to(dtype) * MASK_VALUE
    return mask.to(device)


@lru_cache(maxsize=64)
def bias_index(window: Triple, used: Triple, indexing: str, device: torch.device) -> Tensor:
    """Find the row of the bias table for each pair of tokens of a window, flat int64 [L*L].

    `window` is the configured window, whose table has (2T-1)(2H-1)(2W-1) rows; `used` the clamped one.
    `offset` takes the true offset between two tokens; `official` takes the first L rows and columns of
    the full window's index, as the published code does (the same unless H or W is clamped).
    """
    with _plain_cpu():
        span = [2 * w - 1 for w in window]
        shape = used if indexing == "offset" else window
        axes = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        flat = torch.stack([axis.reshape(-1) for axis in axes])  # [3, L]
        t, h, w = flat[:, :, None] - flat[:, None, :] + (torch.tensor(window) - 1)[:, None, None]
        index: Tensor = (t * span[1] + h) * span[2] + w
        length = used[0] * used[1] * used[2]
        return index[:length, :length].reshape(-1).to(device)
