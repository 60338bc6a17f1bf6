"""Video Swin Transformer (arXiv 2106.13230): the whole model, from clip to logits.

Shapes: B = clips; T, H, W = frames and pixels of a clip; T', H', W' = its token grid; N = T'*H'*W'; C = channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vswin_dist.errors import ConfigError

from .attention import WindowAttention
from .blocks import NORM_EPS, PatchEmbed, PatchMerging, ResidualBlock, SwinBlock, TemporalBlock, recompute
from .ops import check_kernel
from .presets import Architecture, resolve, settings_of
from .stochastic import HEAD_PLACE, dropout
from .windows import BatchPlan, Triple

SPLIT_LAYERS = 2  # temporal layers after the last stage in the split design (table 4)


class Stage(nn.Module):
    """Blocks on one grid, every second one shifted, then patch merging (except in the last stage)."""

    def __init__(self, a: Architecture, stage: int, rates: Iterator[float]) -> None:
        super().__init__()
        dim = a.embed_dim << stage
        window = a.attention_window
        shifts = {"3d": (1, 1, 1), "spatial": (0, 1, 1), "none": (0, 0, 0)}[a.shift]
        first = sum(a.depths[:stage])
        self.gradient_checkpointing = a.gradient_checkpointing
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                a.num_heads[stage],
                window,
                tuple(w // 2 * on * (j % 2) for w, on in zip(window, shifts, strict=True)),  # type: ignore[arg-type]
                a.bias_index,
                first + j,
                next(rates),
                a.window_size[0] if a.attention_design == "factorized" else None,
            )
            for j in range(a.depths[stage])
        )
        self.downsample = PatchMerging(dim) if stage + 1 < len(a.depths) else None

    def plans(self, grid: Triple, batch: int, device: torch.device) -> list[BatchPlan]:
        """Plan of each block on a grid of B clips; cached."""
        return [block.plan(grid, batch, device) for block in self.blocks if isinstance(block, SwinBlock)]

    def forward(self, x: Tensor, plans: Sequence[BatchPlan], keys: Tensor | None) -> Tensor:
        """Tokens [B, N, C], one plan for each block -> tokens of the next stage."""
        for block, plan in zip(self.blocks, plans, strict=True):
            if self.training and self.gradient_checkpointing == "block":
                x = recompute(block, x, plan, keys)
            else:
                x = block(x, plan, keys)
        return x if self.downsample is None else self.downsample(x, plans[-1].grid)


class VideoSwin(nn.Module):
    """Classifier of clips. Build it with `build_model`; ``settings`` rebuilds the same architecture."""

    def __init__(self, name: str, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.architecture = a
        self.settings = settings_of(name, a)
        blocks = sum(a.depths)
        rates = iter([a.drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks)])
        self.patch_embed = PatchEmbed(a.patch_size, a.embed_dim)
        self.layers = nn.ModuleList(Stage(a, i, rates) for i in range(len(a.depths)))
        dim = a.embed_dim << (len(a.depths) - 1)
        self.temporal_layers = nn.ModuleList(
            TemporalBlock(dim, a.num_heads[-1], a.window_size[0], blocks + i, a.drop_path_rate)
            for i in range(SPLIT_LAYERS if a.attention_design == "split" else 0)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.head = nn.Linear(dim, a.num_classes)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.recompute_attention = a.gradient_checkpointing == "selective"
            if isinstance(module, WindowAttention):
                module.kernel = a.attention_kernel
        self.apply(_init_linear)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, clips: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Clips float [B, 3, T, H, W] -> logits [B, num_classes].

        ``sample_keys`` int64 [B] (see `stochastic.sample_keys`) decide drop path and dropout in training;
        without them they are drawn. They do nothing in eval mode. Raises ConfigError for clips of another
        shape or dtype, or where the attention kernel cannot compute.
        """
        keys = self._keys(clips, sample_keys)
        pooled = self._tokens(clips, keys, self._plans(clips)).mean(1)
        if keys is not None and self.architecture.head_dropout > 0.0:
            pooled = dropout(pooled, keys, HEAD_PLACE, self.architecture.head_dropout)
        logits: Tensor = self.head(pooled)
        return logits

    def forward_features(self, clips: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Clips float [B, 3, T, H, W] -> features after the final norm [B, C, T', H', W']."""
        keys = self._keys(clips, sample_keys)
        plans = self._plans(clips)
        x = self._tokens(clips, keys, plans)
        return x.transpose(1, 2).reshape(x.shape[0], -1, *plans[-1][-1].grid)

    def _plans(self, clips: Tensor) -> list[list[BatchPlan]]:
        """Plan of every block of every stage, all of them cached: looked up apart from the computation."""
        grid = self.patch_embed.grid(clips)
        plans = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            plans.append(stage.plans(grid, clips.shape[0], clips.device))
            grid = (grid[0], (grid[1] + 1) // 2, (grid[2] + 1) // 2)
        return plans

    def _tokens(self, clips: Tensor, keys: Tensor | None, plans: list[list[BatchPlan]]) -> Tensor:
        """Normalised tokens of the last stage [B, N, C]."""
        if self.training and self.architecture.compile:
            return _compiled()(self, clips, keys, plans)
        return self._compute(clips, keys, plans)

    def _compute(self, clips: Tensor, keys: Tensor | None, plans: list[list[BatchPlan]]) -> Tensor:
        x = self.patch_embed(clips)
        whole = self.training and self.architecture.gradient_checkpointing == "stage"
        for stage, own in zip(self.layers, plans, strict=True):
            x = recompute(stage, x, own, keys) if whole else stage(x, own, keys)
        each = self.training and self.architecture.gradient_checkpointing in ("block", "stage")
        for block in self.temporal_layers:
            last = plans[-1][-1]
            x = recompute(block, x, last, keys) if each else block(x, last, keys)
        out: Tensor = self.norm(x)
        return out

    def _keys(self, clips: Tensor, sample_keys: Tensor | None) -> Tensor | None:
        """Keys in training (drawn where none are given), None in eval; checks the input."""
        self._check_clips(clips)
        if not self.training:
            return None
        batch = clips.shape[0]
        if sample_keys is None:
            return torch.randint(-(1 << 63), (1 << 63) - 1, (batch,), dtype=torch.int64, device=clips.device)
        if sample_keys.dtype != torch.int64 or sample_keys.shape != (batch,):
            raise ConfigError(
                f"sample_keys must be int64 [{batch}], one per clip, not {sample_keys.dtype} {list(sample_keys.shape)}"
            )
        return sample_keys

    def _check_clips(self, clips: Tensor) -> None:
        if not isinstance(clips, Tensor):
            raise ConfigError(f"clips must be a tensor [B, 3, T, H, W], not {type(clips).__name__}")
        if clips.dim() != 5:
            raise ConfigError(f"clips must be [B, 3, T, H, W]; got {clips.dim()} axes: {list(clips.shape)}")
        if clips.shape[1] != 3:
            raise ConfigError(f"clips must have 3 channels on axis 1 ([B, 3, T, H, W]); got {list(clips.shape)}")
        if not clips.is_floating_point():
            raise ConfigError(f"clips must be floating point and normalised; got {clips.dtype}")
        wanted = self.head.weight.dtype
        if clips.dtype != wanted and not torch.is_autocast_enabled(clips.device.type):
            raise ConfigError(f"clips are {clips.dtype} and the weights {wanted}: cast either, or run under autocast")
        if 0 in clips.shape:
            raise ConfigError(f"clips have an empty axis: {list(clips.shape)}")
        check_kernel(self.architecture.attention_kernel, clips.device, clips.dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    """One graph for each shape of clips; kept apart from the models, which thus copy and pickle as ever."""
    return torch.compile(VideoSwin._compute, dynamic=False, fullgraph=True)


def _init_linear(module: nn.Module) -> None:
    """Truncated normal 0.02 and zero bias, as published; norms and the patch projection keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(name: str = "swin_t", num_classes: int = 400, **overrides: Any) -> VideoSwin:
    """A model by preset name: swin_nano, swin_t, swin_s, swin_b or swin_l, with any setting overridden.

    Overrides: patch_size, window_size, embed_dim, depths, num_heads, drop_path_rate, head_dropout,
    attention_design (joint | split | factorized), shift (3d | spatial | none), bias_index (offset | official),
    gradient_checkpointing (none | block | stage | selective), compile (forward and backward of training by
    torch.compile; evaluation runs as it is), attention_kernel (plain | triton, of the windowed attention; triton
    needs a CUDA device, and is not kept in the model's settings). Raises ConfigError for what is unknown or cannot be.
    """
    return VideoSwin(name, resolve(name, num_classes, overrides))
