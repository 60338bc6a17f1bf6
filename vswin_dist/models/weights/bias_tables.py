"""Relative position bias tables of a checkpoint fitted to a model's window: resized, inflated, their index verified.

A table has one row per offset of its window: [(2T-1)(2H-1)(2W-1), h], h heads.
Source: Video Swin paper, section 3.4 and table 9; the published code for the bicubic resizing in space.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from vswin_dist.errors import CheckpointError
from vswin_dist.models.swin.windows import Triple, bias_index
from vswin_dist.models.weights.load_report import Row

CROSS_FRAME_BIAS = -4.6  # bias between frames at the start, where only the centre is inflated (table 9)


def fit_table(
    name: str, have: Tensor, want: tuple[int, ...], index: Tensor | None, window: Triple, flat: bool, bias: str
) -> tuple[Tensor, Row]:
    """Fit the table `have` of a checkpoint to the model's window; returns [(2T-1)(2H-1)(2W-1), h] and a row of the report.

    `index` is the checkpoint's own index of that table, where it stores one: it must be the one that its window
    defines, since the table would mean something else. `flat`: the table is of an image model, whose window has
    no time.

    Raises:
        CheckpointError: the table's window cannot be known, or the index is another.
    """
    shape = tuple(have.shape)
    if have.dim() != 2 or shape[1] != want[1]:
        raise CheckpointError(f"{name}: {list(shape)} in the checkpoint, {list(want)} in the model")
    source = _table_window(name, shape, want, None if index is None else index.shape[0], window, flat)
    _check_index(name, index, source)
    if not flat and source == window:
        return have, Row(name, "taken", shape, want)
    table = resize_table(have, source, (source[0], *window[1:]))
    if flat:
        return _inflate_table(name, table, shape, want, source, window, bias)
    table = resize_table(table, (source[0], *window[1:]), window)
    return table, Row(name, "resized", shape, want, f"window {source} to {window}, bicubic")


def _check_index(name: str, index: Tensor | None, source: Triple) -> None:
    if index is None or index.is_meta:
        return
    expected = bias_index(source, source, "offset", torch.device("cpu"))
    if index.numel() != expected.numel() or not torch.equal(index.cpu().reshape(-1).long(), expected):
        raise CheckpointError(f"{name}: the index {list(index.shape)} stored with it is not that of a window {source}")


def _inflate_table(
    name: str, table: Tensor, shape: tuple[int, ...], want: tuple[int, ...], source: Triple, window: Triple, bias: str
) -> tuple[Tensor, Row]:
    offsets = 2 * window[0] - 1
    reason = "" if source[1:] == window[1:] else f"window {source[1:]} to {window[1:]} bicubic; "
    out = table.repeat(offsets, 1)
    if bias == "centre":
        rows = table.shape[0]
        middle = window[0] - 1
        out = torch.full_like(out, CROSS_FRAME_BIAS)
        out[middle * rows : (middle + 1) * rows] = table
        return out, Row(name, "inflated", shape, want, f"{reason}offset 0 in time, {CROSS_FRAME_BIAS} elsewhere")
    return out, Row(name, "inflated", shape, want, f"{reason}the same for {offsets} offsets in time")


def resize_table(table: Tensor, source: Triple, target: Triple) -> Tensor:
    """Resize the bias table of one window to another, [(2T-1)(2H-1)(2W-1), h] -> the same of `target`.

    Bicubic along each axis (half-pixel centres, a = -0.75, clamped borders, no antialiasing), height and width
    as the published code does it; time by the same kernel. An axis of equal size is left exactly as it is.
    """
    heads = table.shape[1]
    (t, h, w), (t2, h2, w2) = ([2 * n - 1 for n in size] for size in (source, target))
    x = table.t().reshape(heads, t, h, w)
    # float64 keeps its precision; half precisions are resized in float32
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if (h, w) != (h2, w2):
        x = F.interpolate(x, size=(h2, w2), mode="bicubic", align_corners=False)
    if t != t2:
        x = F.interpolate(x.reshape(heads, 1, t, h2 * w2), size=(t2, h2 * w2), mode="bicubic", align_corners=False)
    return x.reshape(heads, -1).t().contiguous().to(table.dtype)


def _table_window(
    name: str, shape: tuple[int, ...], want: tuple[int, ...], tokens: int | None, window: Triple, flat: bool
) -> Triple:
    """Find the window of a table, from its rows (and the tokens of its index, where stored).

    Rows alone can fit several windows: the model's height and width are tried first, then square windows.
    """
    rows = shape[0]
    found: list[Triple] = []
    sides = [window[1:], *((s, s) for s in range(1, isqrt(rows) + 1))]
    for h, w in sides:
        frames, rest = divmod(rows, (2 * h - 1) * (2 * w - 1))
        t = (frames + 1) // 2
        if rest or frames % 2 == 0 or (flat and t != 1) or (tokens is not None and t * h * w != tokens):
            continue
        found.append((t, h, w))
    if not found:
        stored = "" if tokens is None else f" of {tokens} tokens, as its index says"
        raise CheckpointError(
            f"{name}: {list(shape)} in the checkpoint is the table of no square window{stored}; {list(want)} in the model"
        )
    if found[0][1:] == window[1:]:
        return found[0]
    likely = [size for size in found if size[1] >= 4 and (flat or size[0] > 1)] or found
    if len(set(likely)) > 1 and window[0] in [size[0] for size in likely]:
        likely = [size for size in likely if size[0] == window[0]]
    if len(set(likely)) > 1:
        raise CheckpointError(
            f"{name}: {list(shape)} in the checkpoint may be of window {' or '.join(map(str, likely))}; "
            f"{list(want)} in the model"
        )
    return likely[0]
