"""Parameters and operations of a model, counted as in the paper's tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vswin_dist.models.swin.model import VideoSwin, build_model


def count_parameters(model: nn.Module) -> int:
    """Count the parameters, trainable and frozen; the model may be on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: VideoSwin, clip: tuple[int, int, int] = (32, 224, 224), *, paper: bool = False) -> int:
    """Count the multiply-accumulates of one forward pass of one clip (T, H, W).

    Counts convolutions, linear layers and attention products, windows as computed, padding included. With
    `paper` two more per element that enters a LayerNorm, which reproduces the numbers of the paper's tables.
    Computed on the meta device: no memory or time to speak of, whatever the model.
    """
    norm_elements = 0

    def count_norm(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal norm_elements
        norm_elements += args[0].numel()

    with torch.device("meta"):
        twin = build_model(**{**model.settings, "gradient_checkpointing": "none"}).eval()
        clips = torch.empty(1, 3, *clip)
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(count_norm)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(clips)
    macs = int(counter.get_total_flops()) // 2
    return macs + (2 * norm_elements if paper else 0)
