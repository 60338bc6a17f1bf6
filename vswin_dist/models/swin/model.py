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
from vswin_dist.models.kernels.dispatch import check_kernel
from vswin_dist.models.parameter_roles import Kind, ParameterRole
from vswin_dist.models.stochastic import HEAD_LAYER, drop_path_scales, dropout
from vswin_dist.models.swin.attention import TemporalAttention, WindowAttention
from vswin_dist.models.swin.blocks import (
    NORM_EPS,
    PatchEmbed,
    PatchMerging,
    ResidualBlock,
    SwinBlock,
    TemporalBlock,
    recompute,
)
from vswin_dist.models.swin.presets import Architecture, resolve, settings_of
from vswin_dist.models.swin.windows import BatchGeometry, Triple

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

    def geometries(self, grid: Triple, batch: int, device: torch.device) -> list[BatchGeometry]:
        """Return the geometry of each block on a grid of B clips; cached."""
        return [block.geometry(grid, batch, device) for block in self.blocks if isinstance(block, SwinBlock)]

    def forward(self, x: Tensor, geometries: Sequence[BatchGeometry], scales: Tensor | None) -> Tensor:
        """Map tokens [B, N, C], with one geometry for each block, -> tokens of the next stage."""
        for block, geometry in zip(self.blocks, geometries, strict=True):
            if self.training and self.gradient_checkpointing == "block":
                x = recompute(block, x, geometry, scales)
            else:
                x = block(x, geometry, scales)
        return x if self.downsample is None else self.downsample(x, geometries[-1].grid)


class VideoSwin(nn.Module):
    """Classifier of clips. Build it with `build_model`; `settings` rebuilds the same architecture."""

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
        residual = [m for m in self.modules() if isinstance(m, ResidualBlock)]  # by their numbers
        self.drop_path_rates = tuple(block.drop_path_rate for block in residual for _ in range(2))  # of their branches
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.recompute_attention = a.gradient_checkpointing == "selective"
            if isinstance(module, WindowAttention):
                module.kernel = a.attention_kernel
        self.apply(_init_linear)
        if not self.head.weight.is_meta:  # where `normal_` would import PyTorch's compiler for nothing, some two seconds
            nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, clips: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Classify clips float [B, 3, T, H, W] -> logits [B, num_classes].

        `sample_keys` int64 [B] (see `stochastic.sample_keys`) decide drop path and dropout in training;
        without them they are drawn. They do nothing in eval mode.

        Raises:
            ConfigError: clips or keys of another shape or dtype, or a device that the attention kernel is not for.
        """
        keys = self._keys(clips, sample_keys)
        pooled = self._tokens(clips, keys, self._geometries(clips)).mean(1)
        if keys is not None and self.architecture.head_dropout > 0.0:
            pooled = dropout(pooled, keys, HEAD_LAYER, self.architecture.head_dropout)
        logits: Tensor = self.head(pooled)
        return logits

    def forward_features(self, clips: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Compute the features after the final norm: clips float [B, 3, T, H, W] -> [B, C, T', H', W'].

        Raises:
            ConfigError: as `forward`.
        """
        keys = self._keys(clips, sample_keys)
        geometries = self._geometries(clips)
        x = self._tokens(clips, keys, geometries)
        return x.transpose(1, 2).reshape(x.shape[0], -1, *geometries[-1][-1].grid)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """Say what each parameter is to an optimizer; names and order are those of `named_parameters`."""
        roles, depth = {}, 0
        for prefix, module in self.named_modules():  # each before those inside it, in the order of computation
            if isinstance(module, ResidualBlock):
                depth = module.number + 1
            if module is self.head:
                depth += 1
            for name, parameter in module.named_parameters(prefix, recurse=False):
                roles[name] = ParameterRole("head" if module is self.head else "backbone", depth, _kind(module, parameter))
        return roles

    def _geometries(self, clips: Tensor) -> list[list[BatchGeometry]]:
        """Geometry of every block of every stage, all of them cached: looked up apart from the computation."""
        grid = self.patch_embed.grid(clips)
        geometries = []
        for stage in self.layers:
            assert isinstance(stage, Stage)
            geometries.append(stage.geometries(grid, clips.shape[0], clips.device))
            grid = (grid[0], (grid[1] + 1) // 2, (grid[2] + 1) // 2)
        return geometries

    def _tokens(self, clips: Tensor, keys: Tensor | None, geometries: list[list[BatchGeometry]]) -> Tensor:
        """Normalised tokens of the last stage [B, N, C]."""
        scales = None if keys is None else drop_path_scales(keys, self.drop_path_rates)
        if self.training and self.architecture.compile:
            return _compiled()(self, clips, scales, geometries)
        return self._compute(clips, scales, geometries)

    def _compute(self, clips: Tensor, scales: Tensor | None, geometries: list[list[BatchGeometry]]) -> Tensor:
        x = self.patch_embed(clips)
        whole = self.training and self.architecture.gradient_checkpointing == "stage"
        for stage, own in zip(self.layers, geometries, strict=True):
            x = recompute(stage, x, own, scales) if whole else stage(x, own, scales)
        each = self.training and self.architecture.gradient_checkpointing in ("block", "stage")
        for block in self.temporal_layers:
            last = geometries[-1][-1]
            x = recompute(block, x, last, scales) if each else block(x, last, scales)
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


def _kind(module: nn.Module, parameter: nn.Parameter) -> Kind:
    """Kind of a parameter that the module itself holds, see `ParameterRole`."""
    if isinstance(module, nn.LayerNorm):
        return "norm"
    if isinstance(module, (WindowAttention, TemporalAttention)) and parameter is module.relative_position_bias_table:
        return "bias_table"
    return "weight" if parameter.ndim > 1 else "bias"


def _init_linear(module: nn.Module) -> None:
    """Draw a truncated normal of 0.02, and zero the bias, as published; norms and the patch projection keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(name: str = "swin_t", num_classes: int = 400, **overrides: Any) -> VideoSwin:
    """Build a model by preset name (swin_nano, swin_t, swin_s, swin_b or swin_l), with any setting overridden.

    Overrides: patch_size, window_size, embed_dim, depths, num_heads, drop_path_rate, head_dropout,
    attention_design (joint | split | factorized), shift (3d | spatial | none), bias_index (offset | official),
    gradient_checkpointing (none | block | stage | selective), compile (forward and backward of training by
    torch.compile; evaluation runs as it is), attention_kernel (auto | plain | triton, of the windowed attention;
    triton needs a CUDA device; it is not kept in the model's settings).

    Raises:
        ConfigError: a name or setting that is unknown (names the nearest), or a value that cannot be.
    """
    return VideoSwin(name, resolve(name, num_classes, overrides))
