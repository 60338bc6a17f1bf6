"""From decoded frames to the clip that the model takes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def crop_resize(frames: NDArray[np.uint8], box: tuple[float, float, float, float], size: int, flip: bool = False) -> Tensor:
    """Cut `box` (top, left, height, width in pixels) out of `frames` and resize it to a square.

    Args:
        frames: uint8 [T, H, W, 3].

    Returns:
        uint8 [3, T, size, size], RGB, bilinear with half-pixel centres.
    """
    height, width = frames.shape[1:3]
    top, left = min(int(box[0] + 0.5), height - 1), min(int(box[1] + 0.5), width - 1)
    bottom = min(max(int(box[0] + box[2] + 0.5), top + 1), height)
    right = min(max(int(box[1] + box[3] + 0.5), left + 1), width)
    cut = torch.from_numpy(np.ascontiguousarray(frames[:, top:bottom, left:right]))
    clip = cut.permute(0, 3, 1, 2)  # [T, 3, h, w]
    if clip.shape[2:] != (size, size):
        clip = F.interpolate(clip, size=(size, size), mode="bilinear", align_corners=False)
    if flip:
        clip = clip.flip(3)
    return clip.permute(1, 0, 2, 3).contiguous()


def normalise(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, T, H, W] to `dtype`, ``(x - mean) / std`` per channel in float32."""
    shape = (1, 3, 1, 1, 1)
    centre = torch.tensor(mean, device=clips.device).view(shape)
    spread = torch.tensor(std, device=clips.device).view(shape)
    return ((clips.float() - centre) / spread).to(dtype)
