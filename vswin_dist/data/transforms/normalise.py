"""From decoded clips to what the model takes, in batches on the device that they are on.

Clips are uint8 [B, 3, T, S, S] in RGB, or planes [B, T, S * S * 3 / 2] as `decode.decode_views` makes them.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the CPU to `device`. A GPU is not waited for, which takes pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # what an evaluation makes first serves a training run too
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Give `values` in float32 on `device`, made once; not to be changed."""
    return send(torch.tensor(values), device)


def to_rgb(clips: Tensor) -> Tensor:
    """Convert clips in either form to uint8 RGB [B, 3, T, S, S]; RGB itself is returned as it is.

    Planes are BT.601 of limited range (ITU-R BT.601-7, 2.5) with centred chroma, which is resized bilinearly.
    """
    if clips.ndim == 5:
        return clips
    batch, time, length = clips.shape
    size = math.isqrt(length * 2 // 3)
    luma, chroma = clips.split([size * size, length - size * size], 2)
    y = (luma.view(batch, time, size, size).float() - 16) * (255 / 219)
    halves = chroma.reshape(batch * time, 2, size // 2, size // 2).float().sub_(128).mul_(255 / 224)
    blue, red = F.interpolate(halves, scale_factor=2, mode="bilinear").view(batch, time, 2, size, size).unbind(2)
    rgb = torch.stack((y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue), 1)
    return rgb.round_().clamp_(0, 255).to(torch.uint8)


def normalise(clips: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Convert clips in either form to RGB [B, 3, T, S, S] of `dtype`, `(x - mean) / std` per channel in float32."""
    centre, spread = (constant(values, clips.device).view(1, 3, 1, 1, 1) for values in (mean, std))
    return ((to_rgb(clips).float() - centre) / spread).to(dtype)
