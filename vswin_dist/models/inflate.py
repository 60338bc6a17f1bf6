"""Fitting the tensors of a checkpoint to a model: inflation from 2D and resizing of bias tables.

Source: Video Swin paper, section 3.4 (initialisation from a 2D model) and tables 8 and 9 (centre variants).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from vswin_dist.errors import CheckpointError, ConfigError

from .layouts import is_2d, recognise, to_native, unwrap
from .report import LoadReport, Row
from .swin3d import VideoSwin
from .windows import Triple

KERNEL = "patch_embed.proj.weight"
TABLE = "relative_position_bias_table"
CROSS_FRAME_BIAS = -4.6  # bias between frames at the start, where only the centre is inflated (table 9)
BUFFERS = ("relative_position_index", "attn_mask")
NEW_IN_DESIGN = (".temporal.", "temporal_layers.")  # tensors that no published checkpoint has
EMBEDDINGS = ("inflate", "centre")
BIASES = ("duplicate", "centre")


def inflate(
    state_2d: Mapping[str, Tensor], model: VideoSwin, embedding: str = "inflate", bias: str = "duplicate"
) -> LoadReport:
    """Start a video model from an image model's weights (Microsoft or timm layout).

    ``embedding``: the 2D patch kernel repeated over time and divided by the temporal patch (``inflate``), or
    placed in the middle slice with zeros elsewhere (``centre``). ``bias``: the 2D table for every offset in
    time (``duplicate``), or for offset 0 only with -4.6 elsewhere (``centre``). The classifier stays fresh.
    Raises ConfigError for another option, CheckpointError for weights that are not 2D or do not fit.
    """
    if embedding not in EMBEDDINGS:
        raise ConfigError(f"embedding={embedding!r} is not one of {', '.join(EMBEDDINGS)}")
    if bias not in BIASES:
        raise ConfigError(f"bias={bias!r} is not one of {', '.join(BIASES)}")
    state = unwrap(state_2d, "2D weights")
    layout = recognise(state, "2D weights")
    if layout not in ("microsoft2d", "timm2d"):
        raise CheckpointError(f"2D weights: the layout is {layout}, which is a video model's; use load_pretrained")
    return fit(state, model, layout, "2D weights", embedding=embedding, bias=bias)


@torch.no_grad()
def break_time_symmetry(model: VideoSwin, strength: float, seed: int) -> None:
    """Let inflated patches tell a clip from its reverse, which the 2D weights repeated over time cannot.

    Adds noise of `strength` times the kernel's standard deviation whose sum over the temporal patch is zero, so that
    a still clip is embedded exactly as before. Not part of the published method: on small sets of directed motion,
    training otherwise spends many epochs before it tells left from right. A temporal patch of 1 is left as it is.
    """
    kernel = model.patch_embed.proj.weight  # [C, 3, P, p, p]
    noise = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed))
    noise -= noise.mean(2, keepdim=True)
    kernel += strength * float(kernel.std()) * noise.to(kernel)


def fit(
    state: Mapping[str, Tensor],
    model: VideoSwin,
    layout: str,
    source: str,
    *,
    embedding: str = "inflate",
    bias: str = "duplicate",
    dry_run: bool = False,
) -> LoadReport:
    """Fit a recognised state dict to the model and, unless ``dry_run``, copy it in.

    All tensors are explained before the first is copied; CheckpointError names those that are not.
    """
    named = {to_native(name, layout): tensor for name, tensor in state.items()}
    report = LoadReport(layout, source)
    flat = is_2d(named)
    fitted: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, target in model.state_dict().items():
        have = named.get(name)
        try:
            tensor, row = _fit_one(name, have, target, named, model, flat, embedding, bias)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        report.rows.append(row)
        if tensor is not None:
            fitted[name] = tensor
    for name, tensor in named.items():
        if name in model.state_dict():
            continue
        if name.rsplit(".", 1)[-1] in BUFFERS:
            report.rows.append(Row(name, "dropped", tuple(tensor.shape), None, "buffer, computed here"))
        else:
            problems.append(f"{name} {list(tensor.shape)}: the model has no such tensor")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        listed = "; ".join(problems[:3])
        raise CheckpointError(
            f"{source}: the {layout} checkpoint does not fit {model.settings['name']}: {listed}{more}"
        )
    if not dry_run:
        _copy(fitted, model)
    return report


def _copy(fitted: Mapping[str, Tensor], model: VideoSwin) -> None:
    parameters = dict(model.named_parameters())
    if any(p.is_meta for p in parameters.values()):
        raise CheckpointError("the model is on the meta device: only a dry run can load into it")
    with torch.no_grad():
        for name, tensor in fitted.items():
            parameters[name].copy_(tensor)


def _fit_one(
    name: str,
    have: Tensor | None,
    target: Tensor,
    named: Mapping[str, Tensor],
    model: VideoSwin,
    flat: bool,
    embedding: str,
    bias: str,
) -> tuple[Tensor | None, Row]:
    """The tensor to copy (None: keep the fresh one) and its row of the report."""
    want = tuple(target.shape)
    if name.startswith("head."):
        return _fit_head(name, have, want, flat)
    if have is None:
        if any(part in name for part in NEW_IN_DESIGN):
            return None, Row(name, "fresh", None, want, "temporal layers of this design")
        raise CheckpointError(f"{name} {list(want)}: absent from the checkpoint")
    shape = tuple(have.shape)
    if name == KERNEL and flat:
        return _inflate_kernel(have, want, embedding)
    if name.endswith(TABLE) and not any(part in name for part in NEW_IN_DESIGN):
        index = named.get(name.replace(TABLE, BUFFERS[0]))
        return _fit_table(name, have, want, index, model.architecture.attention_window, flat, bias)
    if shape != want:
        raise CheckpointError(f"{name}: {list(shape)} in the checkpoint, {list(want)} in the model")
    return have, Row(name, "taken", shape, want)


def _fit_head(name: str, have: Tensor | None, want: tuple[int, ...], flat: bool) -> tuple[Tensor | None, Row]:
    if have is None:
        return None, Row(name, "fresh", None, want, "the checkpoint has no classifier")
    shape = tuple(have.shape)
    if flat:
        return None, Row(name, "fresh", shape, want, "classifier of images, not of videos")
    if shape == want:
        return have, Row(name, "taken", shape, want)
    if shape[1:] != want[1:]:
        raise CheckpointError(f"{name}: {list(shape)} in the checkpoint, {list(want)} in the model")
    return None, Row(name, "fresh", shape, want, f"{shape[0]} classes in the checkpoint, {want[0]} in the model")


def _inflate_kernel(have: Tensor, want: tuple[int, ...], embedding: str) -> tuple[Tensor, Row]:
    """[C, 3, h, w] -> [C, 3, t, h, w]."""
    shape = tuple(have.shape)
    if (*want[:2], *want[3:]) != shape:
        raise CheckpointError(f"{KERNEL}: {list(shape)} in the checkpoint, {list(want)} in the model")
    frames = want[2]
    if embedding == "inflate":
        out = have.unsqueeze(2).expand(want) / frames
        return out, Row(KERNEL, "inflated", shape, want, f"repeated over {frames} frames, divided by {frames}")
    out = torch.zeros(want, dtype=have.dtype, device=have.device)
    out[:, :, frames // 2] = have
    return out, Row(KERNEL, "inflated", shape, want, f"in slice {frames // 2} of {frames}, zeros elsewhere")


def _fit_table(
    name: str, have: Tensor, want: tuple[int, ...], index: Tensor | None, window: Triple, flat: bool, bias: str
) -> tuple[Tensor, Row]:
    """Bias table of the checkpoint's window -> the model's, [(2T-1)(2H-1)(2W-1), h]."""
    shape = tuple(have.shape)
    if have.dim() != 2 or shape[1] != want[1]:
        raise CheckpointError(f"{name}: {list(shape)} in the checkpoint, {list(want)} in the model")
    if not flat and shape == want:
        return have, Row(name, "taken", shape, want)
    tokens = None if index is None else index.shape[0]
    source = _table_window(name, shape, want, tokens, window, flat)
    table = resize_table(have, source, (source[0], *window[1:]))
    if flat:
        return _inflate_table(name, table, shape, want, source, window, bias)
    table = resize_table(table, (source[0], *window[1:]), window)
    return table, Row(name, "resized", shape, want, f"window {source} to {window}, bicubic")


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
    """Bias table of one window resized to another, [(2T-1)(2H-1)(2W-1), h] -> the same of ``target``.

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
    """Window of a table, from its rows (and the tokens of its index, where stored).

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
        raise CheckpointError(
            f"{name}: {list(shape)} in the checkpoint is the table of no square window; {list(want)} in the model"
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
