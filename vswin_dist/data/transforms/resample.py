"""Clips as their videos store them, resized and made RGB on the device that they are on.

What FFmpeg's scaler does with `flags=bilinear` for `data.pixel_format=rgb`, as two matrix products of each plane: each pixel
is the mean of the samples about its centre with weights that fall linearly to 0, over one sample where a picture grows and
over the length of a pixel where it shrinks; beyond the crop its outermost samples repeat.

Shapes: B clips of T frames of different sizes, S pixels of the square that each becomes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vswin_dist.data.video.stored_crop import Crop

# Kr, Kb: what red and blue weigh in luma (ITU-T H.273, table 4), by the colorspace filter's names
_WEIGHTS = {
    "smpte170m": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
    "bt2020nc": (0.2627, 0.0593),
}


def crops_to_rgb(clips: Tensor, crops: Sequence[Crop], frames: int, size: int) -> Tensor:
    """Resize each clip by itself to uint8 RGB [B, 3, T, S, S].

    Args:
        clips: uint8, one clip after the other, each [T, `Crop.bytes`].
        frames: T.
        size: S.
    """
    rgb = clips.new_empty((len(crops), 3, frames, size, size))
    for result, crop, clip in zip(rgb, crops, clips.split([frames * crop.bytes for crop in crops]), strict=True):
        _clip_to_rgb(clip.view(frames, crop.bytes), crop, result)
    return rgb


def _clip_to_rgb(clip: Tensor, crop: Crop, result: Tensor) -> None:
    size, device = result.shape[-1], clip.device
    luma, *chroma = crop.planes(clip)
    rows = weights(size, crop.height, crop.height, 0.5, 1, device)
    columns = weights(size, crop.width, crop.width, 0.5, 1, device)
    chroma_rows = weights(size, crop.chroma_height, crop.height, crop.chroma_top, 2, device)
    chroma_columns = weights(size, crop.chroma_width, crop.width, crop.chroma_left, 2, device)
    if crop.flip:
        columns, chroma_columns = columns.flip(0), chroma_columns.flip(0)
    black, luma_range, chroma_range = (0, 255, 255) if crop.full_range else (16, 219, 224)
    y = (rows @ (luma.float() @ columns.T)).sub_(black).mul_(255 / luma_range)
    blue, red = ((chroma_rows @ (plane.float() @ chroma_columns.T)).sub_(128).mul_(255 / chroma_range) for plane in chroma)
    of_red, of_blue = _WEIGHTS[crop.matrix]
    of_green = 1 - of_red - of_blue
    from_red, from_blue = 2 * (1 - of_red), 2 * (1 - of_blue)
    green = y.sub(blue, alpha=from_blue * of_blue / of_green).sub_(red, alpha=from_red * of_red / of_green)
    for channel, values in zip(result, (y.add(red, alpha=from_red), green, y.add(blue, alpha=from_blue)), strict=True):
        channel.copy_(values.round_().clamp_(0, 255))


def weights(size: int, samples: int, length: int, first: float, step: int, device: torch.device) -> Tensor:
    """Give what each of `samples` samples weighs in each of `size` pixels: float32 [size, samples], rows of sum 1.

    Args:
        length: of what the pixels divide evenly.
        first: where the first sample lies on it.
        step: from one sample to the next.
    """
    reach = max(length / size / step, 1.0)
    beyond = math.ceil(reach) + 1
    centres = (torch.arange(size, device=device, dtype=torch.float32).add_(0.5) * (length / size) - first) / step
    at = torch.arange(-beyond, samples + beyond, device=device, dtype=torch.float32)
    found = (1 - (at - centres[:, None]).abs_() / reach).clamp_(min=0)
    found = found / found.sum(1, keepdim=True)
    inside = found[:, beyond:-beyond].contiguous()
    inside[:, 0] += found[:, :beyond].sum(1)
    inside[:, -1] += found[:, -beyond:].sum(1)
    return inside
