"""Transformer blocks, patch embedding and patch merging.

Shapes: B = clips, N = T*H*W tokens in raster order, C = channels. Tokens are channels-last everywhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vswin_dist.models.kernels.dispatch import Linear, mlp
from vswin_dist.models.swin.attention import TemporalAttention, WindowAttention, ZeroStartTemporalAttention
from vswin_dist.models.swin.windows import BatchGeometry, Triple, batch_geometry

NORM_EPS = 1e-5


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` without keeping activations; nothing draws from a generator, so no generator state is kept."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class Mlp(nn.Module):
    """Linear C -> 4C, exact (erf) GELU, Linear 4C -> C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, C] -> [B, N, C]."""
        return mlp(x, self.fc1, self.fc2)


class ResidualBlock(nn.Module, ABC):
    """Pre-norm residual pair, attention then MLP, with stochastic depth; subclasses say which attention.

    `number` is the block's index in the model, temporal blocks included: its two branches draw at 2*number and 2*number + 1.
    """

    def __init__(self, dim: int, number: int, drop_path_rate: float) -> None:
        super().__init__()
        self.number = number
        self.drop_path_rate = drop_path_rate
        self.recompute_attention = False
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim)

    @abstractmethod
    def attend(self, x: Tensor, geometry: BatchGeometry) -> Tensor:
        """Compute the attention branch before its residual: tokens [B, N, C] -> [B, N, C]."""

    def forward(self, x: Tensor, geometry: BatchGeometry, scales: Tensor | None) -> Tensor:
        """Map tokens [B, N, C] of the geometry's grid -> [B, N, C]; `scales` are `drop_path_scales` in training, or None."""
        if self.training and self.recompute_attention:
            branch = recompute(self.attend, x, geometry)
        else:
            branch = self.attend(x, geometry)
        x = self._add(x, branch, scales, 2 * self.number)
        return self._add(x, self.mlp(self.norm2(x)), scales, 2 * self.number + 1)

    def _add(self, x: Tensor, branch: Tensor, scales: Tensor | None, position: int) -> Tensor:
        if scales is None or self.drop_path_rate == 0.0:
            return x + branch
        return torch.addcmul(x, branch, scales[position].to(x.dtype)[:, None, None])


class SwinBlock(ResidualBlock):
    """Block with (shifted) window attention; in the factorized design followed by attention along time."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Triple,
        shift: Triple,
        indexing: str,
        number: int,
        drop_path_rate: float,
        temporal_reach: int | None,
    ) -> None:
        super().__init__(dim, number, drop_path_rate)
        self.window = window
        self.shift = shift
        self.indexing = indexing
        self.attn = WindowAttention(dim, window, heads)
        self.temporal = None
        if temporal_reach is not None:
            self.temporal = ZeroStartTemporalAttention(dim, heads, temporal_reach)

    def geometry(self, grid: Triple, batch: int, device: torch.device) -> BatchGeometry:
        """Say where the windows of this block lie on a grid of B clips; cached."""
        dtype = self.attn.relative_position_bias_table.dtype
        return batch_geometry(grid, self.window, self.shift, self.indexing, batch, device, dtype)

    def attend(self, x: Tensor, geometry: BatchGeometry) -> Tensor:
        out: Tensor = self.attn(self.norm1(x), geometry)
        return out if self.temporal is None else self.temporal(out, geometry.grid[0])


class TemporalBlock(ResidualBlock):
    """Block whose attention runs along time only (split design, table 4)."""

    def __init__(self, dim: int, heads: int, reach: int, number: int, drop_path_rate: float) -> None:
        super().__init__(dim, number, drop_path_rate)
        self.attn = TemporalAttention(dim, heads, reach)

    def attend(self, x: Tensor, geometry: BatchGeometry) -> Tensor:
        out: Tensor = self.attn(self.norm1(x), geometry.grid[0])
        return out


class PatchProjection(nn.Conv3d):
    """Convolution whose stride is its kernel, computed as one matrix product that writes channels last."""

    def forward(self, clips: Tensor) -> Tensor:
        """Project clips [B, 3, T, H, W], divisible by the patch -> [B, T', H', W', C]."""
        batch, channels = clips.shape[:2]
        split = [size for n, k in zip(clips.shape[2:], self.kernel_size, strict=True) for size in (n // k, k)]
        patches = clips.view(batch, channels, *split).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return F.linear(patches.flatten(4), self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Clip -> normalised tokens. A clip that does not divide is padded with zeros at the end of each axis."""

    def __init__(self, patch: Triple, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = PatchProjection(3, dim, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def grid(self, clips: Tensor) -> Triple:
        """Return the token grid of clips [B, 3, T, H, W]."""
        t, h, w = (-(-n // p) for n, p in zip(clips.shape[2:], self.patch, strict=True))
        return t, h, w

    def forward(self, clips: Tensor) -> Tensor:
        """Embed clips [B, 3, T, H, W] -> tokens [B, N, C]."""
        missing = [-n % p for n, p in zip(clips.shape[2:], self.patch, strict=True)]
        if any(missing):
            clips = F.pad(clips, (0, missing[2], 0, missing[1], 0, missing[0]))
        out: Tensor = self.norm(self.proj(clips.contiguous()).flatten(1, 3))
        return out


class PatchMerging(nn.Module):
    """Halves height and width: four neighbours (0,0), (1,0), (0,1), (1,1) side by side, norm, Linear 4C -> 2C."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=NORM_EPS)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, grid: Triple) -> Tensor:
        """Merge tokens [B, N, C] of a grid -> [B, N/4, 2C]; odd axes are padded with zeros."""
        batch, _, dim = x.shape
        t, h, w = grid
        x = x.view(batch, t, h, w, dim)
        if h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        h, w = (h + 1) // 2, (w + 1) // 2
        # [B, T, H', 2, W', 2, C] -> columns ordered (dw, dh, C)
        x = x.view(batch, t, h, 2, w, 2, dim).permute(0, 1, 2, 4, 5, 3, 6).reshape(batch, t * h * w, 4 * dim)
        out: Tensor = self.reduction(self.norm(x))
        return out
