"""Attention with relative position bias: in 3D windows, and along time for the designs of table 4.

Shapes: B = clips, N = T*H*W tokens, L = tokens of a window, C = channels, h = heads, d = C / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vswin_dist.models.kernels.dispatch import (
    Linear,
    choose_kernel,
    from_windows,
    to_windows,
    window_attention,
    window_bias,
)
from vswin_dist.models.swin.windows import BatchGeometry, Triple


class WindowAttention(nn.Module):
    """Multi-head self-attention inside (shifted) 3D windows (paper, section 3.2, equation 2).

    The table has one row per offset of the configured window: [(2T-1)(2H-1)(2W-1), h]. Its index is part of
    the geometry, outside of the module, so that the state dict holds parameters only. `kernel` says what computes
    it: auto, plain or triton (see `dispatch.choose_kernel`).
    """

    def __init__(self, dim: int, window: Triple, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.kernel = "auto"
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, heads))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, geometry: BatchGeometry) -> Tensor:
        """Attend: normalised tokens [B, N, C] -> [B, N, C]."""
        kernel = choose_kernel(self.kernel, x.device, x.dtype)
        windows = to_windows(x, geometry)
        bias = window_bias(self.relative_position_bias_table, geometry, kernel)
        out = window_attention(self.qkv(windows), bias, self.heads, geometry, kernel)
        return from_windows(self.proj(out), geometry)


class TemporalAttention(nn.Module):
    """Multi-head self-attention of each location along all of its frames (paper, table 4).

    The table has one row per offset in time up to `reach`; frames further apart share the last row.
    """

    def __init__(self, dim: int, heads: int, reach: int) -> None:
        super().__init__()
        self.heads = heads
        self.reach = reach
        self.relative_position_bias_table = nn.Parameter(torch.empty(2 * reach - 1, heads))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Attend: tokens [B, T*H*W, C] -> [B, T*H*W, C]."""
        batch, tokens, dim = x.shape
        series = x.view(batch, frames, -1, dim).transpose(1, 2).reshape(-1, frames, dim)  # [B*H*W, T, C]
        offset = torch.arange(frames, device=x.device)
        offset = (offset[:, None] - offset).clamp(1 - self.reach, self.reach - 1) + self.reach - 1
        bias = F.embedding(offset, self.relative_position_bias_table).permute(2, 0, 1)  # [h, T, T]
        q, k, v = self.qkv(series).view(-1, frames, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])  # [B*H*W, h, T, d]
        out: Tensor = self.proj(heads.transpose(1, 2).reshape(-1, frames, dim))
        return out.view(batch, -1, frames, dim).transpose(1, 2).reshape(batch, tokens, dim)


class ZeroStartTemporalAttention(TemporalAttention):
    """Temporal attention weighted by a scalar that starts at zero (factorized design, table 4).

    A model that starts from 2D weights thus starts as the spatial model it was.
    """

    def __init__(self, dim: int, heads: int, reach: int) -> None:
        super().__init__(dim, heads, reach)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Attend: tokens [B, T*H*W, C] -> x + gain * attention, same shape."""
        return x + self.gain * super().forward(x, frames)
