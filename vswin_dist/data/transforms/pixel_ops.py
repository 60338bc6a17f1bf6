"""Operations on the pixels of a clip, uint8 [3, T, S, S] RGB, on any device; every frame is treated alike.

They give what Pillow gives frame by frame (ImageOps, ImageEnhance, ImageFilter, nearest-neighbour transforms): the
published recipe takes imgaug's `pillike` operations, which are defined by that. Statistics (histogram, mean) are of
each frame. Operations that look at one channel of a pixel alone go through tables of 256 entries.

Shapes: R = 3 x T planes, N = S x S pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GREY = 128  # what geometric operations and cut-outs fill with


def autocontrast(clip: Tensor) -> Tensor:
    """Stretch each channel of each frame to 0..255."""
    planes = clip.flatten(2)
    low, high = (x.double().unsqueeze(-1) for x in (planes.amin(2), planes.amax(2)))
    scale = torch.div(torch.full_like(high, 255), (high - low).clamp(min=1))  # 255 / x would be 255 * (1 / x)
    ramp = torch.arange(256, device=clip.device).double()
    tables = (ramp * scale - low * scale).clamp(0, 255)
    return _look_up(clip, torch.where(high > low, tables, ramp).to(torch.uint8))


def equalize(clip: Tensor) -> Tensor:
    """Make the histogram of each channel of each frame as even as its values allow."""
    planes = clip.reshape(-1, clip.shape[2] * clip.shape[3])
    histogram = _histograms(planes)  # [R, 256]
    last = histogram.gather(1, planes.amax(1, keepdim=True).long())
    step = (planes.shape[1] - last) // 255
    before = histogram.cumsum(1) - histogram
    tables = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    ramp = torch.arange(256, device=clip.device)
    return _look_up(clip, torch.where(step > 0, tables, ramp).to(torch.uint8).unflatten(0, (3, -1)))


def invert(clip: Tensor) -> Tensor:
    """Turn each value into 255 - value."""
    return 255 - clip


def solarize(clip: Tensor, threshold: int) -> Tensor:
    """Invert the values from `threshold` on."""
    ramp = torch.arange(256, device=clip.device)
    return _look_up(clip, torch.where(ramp >= threshold, 255 - ramp, ramp).to(torch.uint8))


def posterize(clip: Tensor, bits: int) -> Tensor:
    """Keep the highest `bits` bits (1 to 8) of each value."""
    return clip & (256 - (1 << (8 - bits)))


def brightness(clip: Tensor, factor: float) -> Tensor:
    """Scale away from black by `factor`; 1 changes nothing."""
    ramp = torch.arange(256, device=clip.device).float()
    return _look_up(clip, (ramp * factor).clamp(0, 255).to(torch.uint8))


def contrast(clip: Tensor, factor: float) -> Tensor:
    """Scale away from the frame's mean grey by `factor`."""
    total = torch.cat([_grey(part).flatten(1).sum(1) for part in _parts(clip)])  # [T]
    mean = torch.floor(total.double() / (clip.shape[2] * clip.shape[3]) + 0.5).float()
    ramp = torch.arange(256, device=clip.device).float()
    tables = (mean[:, None] + factor * (ramp - mean[:, None])).clamp(0, 255).to(torch.uint8)  # [T, 256]
    return _look_up(clip, tables.expand(3, -1, -1))


def color(clip: Tensor, factor: float) -> Tensor:
    """Scale away from the pixel's grey by `factor`: the saturation."""
    return torch.cat([_extrapolate(_grey(part).float(), part, factor) for part in _parts(clip)], 1)


def sharpness(clip: Tensor, factor: float) -> Tensor:
    """Scale away from the smoothed frame by `factor`."""
    return torch.cat([_extrapolate(_smooth(part).float(), part, factor) for part in _parts(clip)], 1)


def smooth(clip: Tensor) -> Tensor:
    """Take the 3 x 3 mean in which the centre counts five times; the outermost pixels stay."""
    return torch.cat([_smooth(part) for part in _parts(clip)], 1)


def blur(clip: Tensor) -> Tensor:
    """Take the mean of the 16 pixels two away; the outermost two rows and columns stay."""
    return torch.cat([_blur(part) for part in _parts(clip)], 1)


def rotate(clip: Tensor, degrees: float) -> Tensor:
    """Rotate counter-clockwise about the centre."""
    height, width = clip.shape[2:]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return _affine(clip, (c, -s, x - c * x + s * y), (s, c, y - s * x - c * y))


def shear_x(clip: Tensor, slope: float) -> Tensor:
    """Move each row to the left by `slope` times its distance from the top."""
    return _affine(clip, (1, slope, 0), (0, 1, 0))


def shear_y(clip: Tensor, slope: float) -> Tensor:
    """Move each column upwards by `slope` times its distance from the left."""
    return _affine(clip, (1, 0, 0), (slope, 1, 0))


def translate(clip: Tensor, down: int, right: int) -> Tensor:
    """Move by whole pixels."""
    result = torch.full_like(clip, GREY)
    height, width = clip.shape[2:]
    result[..., max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = clip[
        ..., max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return result


def cutout(clip: Tensor, side: float, y: float, x: float) -> Tensor:
    """Fill a square with grey: `side` of the frame's short side, its centre at `y` and `x` of height and width."""
    height, width = clip.shape[2:]
    half = side * min(height, width) / 2
    top, bottom = round(max(y * height - half, 0)), round(min(y * height + half, height))
    left, right = round(max(x * width - half, 0)), round(min(x * width + half, width))
    result = clip.clone()
    result[..., top:bottom, left:right] = GREY
    return result


def _parts(clip: Tensor) -> tuple[Tensor, ...]:
    """Return the clip's frames, on the CPU two by two: what is computed of them stays in the cache, at half the time."""
    return torch.split(clip, 2 if clip.device.type == "cpu" else clip.shape[1], 1)


def _smooth(clip: Tensor) -> Tensor:
    wide = clip.to(torch.int16)
    total = _box_sum(wide, 3) + 4 * wide[..., 1:-1, 1:-1]
    result = clip.clone()
    result[..., 1:-1, 1:-1] = total.float().div_(13).add_(0.5).to(torch.uint8)
    return result


def _blur(clip: Tensor) -> Tensor:
    wide = clip.to(torch.int16)
    ring = _box_sum(wide, 5) - _box_sum(wide, 3)[..., 1:-1, 1:-1]
    result = clip.clone()
    result[..., 2:-2, 2:-2] = ((ring + 8) >> 4).to(torch.uint8)
    return result


def _grey(clip: Tensor) -> Tensor:
    """Luma of ITU-R 601, rounded: int32 [T, S, S]."""
    red, green, blue = clip.to(torch.int32).unbind()
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000).bitwise_right_shift(16)


def _extrapolate(base: Tensor, clip: Tensor, factor: float) -> Tensor:
    """Return `base + factor * (clip - base)`, cut to 0..255 and to whole numbers; `base` float32, broadcast."""
    return (clip - base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)


def _box_sum(wide: Tensor, side: int) -> Tensor:
    """Sum over the squares of `side` pixels that fit, int16 [..., S - side + 1, S - side + 1]."""
    height, width = wide.shape[-2:]
    rows = sum(wide[..., i : height - side + 1 + i, :] for i in range(side))
    assert isinstance(rows, Tensor)
    total = sum(rows[..., i : width - side + 1 + i] for i in range(side))
    assert isinstance(total, Tensor)
    return total


def _histograms(planes: Tensor) -> Tensor:
    """How often each plane of uint8 [R, N] has each value: int64 [R, 256]."""
    if planes.device.type == "cpu":  # plane by plane, a tenth of the time; but a GPU would be waited for at each of them
        return torch.stack([torch.bincount(p, minlength=256) for p in planes])
    return _scattered_histograms(planes)


def _scattered_histograms(planes: Tensor) -> Tensor:
    """`_histograms` in one operation, whose output's size does not depend on the values."""
    one = torch.ones((), dtype=torch.int64, device=planes.device)
    return one.new_zeros((len(planes), 256)).scatter_add_(1, planes.long(), one.expand(planes.shape))


def _look_up(clip: Tensor, tables: Tensor) -> Tensor:
    """`clip` with each value replaced through `tables`, uint8 [256] for all or [3, T, 256]."""
    planes = clip.flatten(2)
    tables = tables.expand(*planes.shape[:2], 256)
    if clip.device.type == "cpu":  # plane by plane stays in the cache: 2.6 ms where `gather` takes 15
        result = torch.empty_like(planes)
        for target, plane, table in zip(result.flatten(0, 1), planes.flatten(0, 1), tables.flatten(0, 1), strict=True):
            torch.index_select(table, 0, plane.int(), out=target)
        return result.view_as(clip)
    return tables.gather(2, planes.long()).view_as(clip)


def _affine(clip: Tensor, row_x: tuple[float, float, float], row_y: tuple[float, float, float]) -> Tensor:
    """Return the nearest pixel at `(row_x . (x, y, 1), row_y . (x, y, 1))` for each pixel centre (x, y), grey outside."""
    height, width = clip.shape[2:]
    y, x = (torch.arange(n, dtype=torch.float64, device=clip.device) + 0.5 for n in (height, width))
    source_x, source_y = (torch.floor(a * x + (b * y + c)[:, None]).int() for a, b, c in (row_x, row_y))
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    index = torch.where(inside, source_y * width + source_x, 0).flatten()  # int32 [N]
    planes = clip.reshape(-1, height * width)
    if clip.device.type == "cpu":
        result = torch.empty_like(planes)
        for target, plane in zip(result, planes, strict=True):
            torch.index_select(plane, 0, index, out=target)
    else:
        result = planes.index_select(1, index)
    return result.masked_fill_(~inside.flatten(), GREY).view_as(clip)
