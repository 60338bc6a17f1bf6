"""A plain reference of the published algorithm, written for clarity: roll, partition, mask, softmax, reverse.

It shares no code with `vswin_dist.models` but has its parameter names, so that weights pass between the two.
Shapes: B = clips; T, H, W = token grid; C = channels; h = heads; L = tokens of a window. Joint attention only.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative_index(window: tuple[int, ...]) -> Tensor:
    """Row of the bias table for each pair of tokens of the full window, [L, L], one pair of axes at a time."""
    positions = list(product(*(range(n) for n in window)))
    index = torch.empty(len(positions), len(positions), dtype=torch.long)
    for i, a in enumerate(positions):
        for j, b in enumerate(positions):
            row = 0
            for x, y, n in zip(a, b, window, strict=True):
                row = row * (2 * n - 1) + x - y + n - 1
            index[i, j] = row
    return index


def clamped_index(window: tuple[int, ...], used: tuple[int, ...], official: bool) -> Tensor:
    full = relative_index(window)
    if official:
        length = used[0] * used[1] * used[2]
        return full[:length, :length]
    inside = [all(x < n for x, n in zip(position, used, strict=True)) for position in product(*(range(n) for n in window))]
    return full[inside][:, inside]


def partition(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """[B, T, H, W, C] -> [windows, L, C], clips outermost."""
    b, t, h, w, c = x.shape
    x = x.view(b, t // window[0], window[0], h // window[1], window[1], w // window[2], window[2], c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, window[0] * window[1] * window[2], c)


def reverse(x: Tensor, window: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """The inverse of `partition`; size is (B, T, H, W)."""
    b, t, h, w = size
    x = x.view(b, t // window[0], h // window[1], w // window[2], *window, -1)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, t, h, w, -1)


def shift_mask(size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> Tensor:
    """-100 between tokens that the cyclic shift brought together, [windows, L, L]."""
    region = torch.zeros(1, *size, 1)
    slices = [
        (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),) for w, s in zip(window, shift, strict=True)
    ]
    for number, (a, b, c) in enumerate(product(*slices)):
        region[:, a, b, c] = number
    rows = partition(region, window).squeeze(-1)
    return (rows[:, None, :] != rows[:, :, None]).float() * -100.0


class Attention(nn.Module):
    def __init__(self, dim: int, window: tuple[int, ...], heads: int) -> None:
        super().__init__()
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.heads = heads

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        score = (q * (dim // self.heads) ** -0.5) @ k.transpose(-2, -1)
        score = score + self.relative_position_bias_table[index].permute(2, 0, 1)
        if mask is not None:
            score = score.view(-1, mask.shape[0], *score.shape[1:]) + mask[:, None].to(score.dtype)
            score = score.flatten(0, 1)
        return self.proj((score.softmax(-1) @ v).transpose(1, 2).reshape(n, length, dim))


class Block(nn.Module):
    def __init__(self, dim: int, window: tuple[int, ...], shift: tuple[int, ...], heads: int, official: bool) -> None:
        super().__init__()
        self.window, self.shift, self.official = window, shift, official
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, window, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[1:4]
        used = tuple(min(n, w) for n, w in zip(grid, self.window, strict=True))
        shift = tuple(0 if n <= w else s for n, w, s in zip(grid, self.window, self.shift, strict=True))
        missing = [-n % w for n, w in zip(grid, used, strict=True)]
        y = F.pad(self.norm1(x), (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        size = y.shape[:4]
        y = torch.roll(y, [-s for s in shift], (1, 2, 3))
        mask = shift_mask(size[1:], used, shift) if any(shift) else None
        y = self.attn(partition(y, used), clamped_index(self.window, used, self.official), mask)
        y = torch.roll(reverse(y, used, size), shift, (1, 2, 3))
        x = x + y[:, : grid[0], : grid[1], : grid[2]]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Merging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        parts = [x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Stage(nn.Module):
    def __init__(self, blocks: list[Block], merging: Merging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = merging

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class ReferenceSwin(nn.Module):
    """Takes the `settings` of a `VideoSwin` with joint attention; has no drop path or dropout."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        window, dim, depths = tuple(settings["window_size"]), settings["embed_dim"], settings["depths"]
        on = {"3d": (1, 1, 1), "spatial": (0, 1, 1), "none": (0, 0, 0)}[settings["shift"]]
        half = tuple(w // 2 * s for w, s in zip(window, on, strict=True))
        official = settings["bias_index"] == "official"
        self.patch = tuple(settings["patch_size"])
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(3, dim, self.patch, stride=self.patch), "norm": nn.LayerNorm(dim)}
        )
        stages = []
        for i, (depth, heads) in enumerate(zip(depths, settings["num_heads"], strict=True)):
            width = dim * 2**i
            blocks = [Block(width, window, half if j % 2 else (0, 0, 0), heads, official) for j in range(depth)]
            stages.append(Stage(blocks, Merging(width) if i + 1 < len(depths) else None))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, settings["num_classes"])

    def forward_features(self, clips: Tensor) -> Tensor:
        missing = [-n % p for n, p in zip(clips.shape[2:], self.patch, strict=True)]
        x = self.patch_embed["proj"](F.pad(clips, (0, missing[2], 0, missing[1], 0, missing[0])))
        x = self.patch_embed["norm"](x.permute(0, 2, 3, 4, 1))
        for stage in self.layers:
            x = stage(x)
        return self.norm(x).permute(0, 4, 1, 2, 3)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.forward_features(clips).mean((2, 3, 4)))
