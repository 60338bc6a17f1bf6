"""Fitting the tensors of a checkpoint to a model: inflation from 2D, and an explanation of every one of them.

Source: Video Swin paper, section 3.4 (initialisation from a 2D model) and tables 8 and 9 (centre variants).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vswin_dist.errors import CheckpointError, ConfigError
from vswin_dist.models.swin.model import VideoSwin
from vswin_dist.models.weights.bias_tables import fit_table
from vswin_dist.models.weights.layouts import KERNEL, is_2d, recognise, to_native, unwrap
from vswin_dist.models.weights.load_report import LoadReport, Row

TABLE = "relative_position_bias_table"
INDEX, MASK = "relative_position_index", "attn_mask"  # buffers that the published code stores
HEAD = ("head.weight", "head.bias")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NEW_IN_DESIGN = (".temporal.", "temporal_layers.")  # tensors that no published checkpoint has
EMBEDDINGS = ("inflate", "centre")
BIASES = ("duplicate", "centre")


def inflate(
    state_2d: Mapping[str, Tensor], model: VideoSwin, embedding: str = "inflate", bias: str = "duplicate"
) -> LoadReport:
    """Start a video model from an image model's weights (Microsoft or timm layout).

    `embedding`: the 2D patch kernel repeated over time and divided by the temporal patch (`inflate`), or
    put in the middle slice with zeros elsewhere (`centre`). `bias`: the 2D table for every offset in
    time (`duplicate`), or for offset 0 only with -4.6 elsewhere (`centre`). The classifier stays fresh.

    Raises:
        ConfigError: another option.
        CheckpointError: weights that are not 2D or do not fit.
    """
    if embedding not in EMBEDDINGS:
        raise ConfigError(f"embedding={embedding!r} is not one of {', '.join(EMBEDDINGS)}")
    if bias not in BIASES:
        raise ConfigError(f"bias={bias!r} is not one of {', '.join(BIASES)}")
    state, beside = unwrap(state_2d, "2D weights")
    layout = recognise(state, "2D weights")
    if layout not in ("microsoft2d", "timm2d"):
        raise CheckpointError(f"2D weights: the layout is {layout}, which is a video model's; use load_pretrained")
    return fit(state, model, layout, "2D weights", beside, embedding=embedding, bias=bias)


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
    beside: Mapping[str, str],
    *,
    embedding: str = "inflate",
    bias: str = "duplicate",
    dry_run: bool = False,
) -> LoadReport:
    """Fit a recognised state dict to the model and, unless `dry_run`, copy it in.

    `beside` lists what the file holds that is not a weight (see `layouts.unwrap`), for the report. All tensors are
    explained before the first is copied.

    Raises:
        CheckpointError: tensors that cannot be explained; names the first three.
    """
    targets = model.state_dict()
    named, problems = _renamed(state, layout)
    problems += [problem for name, tensor in named.items() if (problem := _unfit_values(name, tensor, dry_run))]
    report = LoadReport(layout, source)
    fitted: dict[str, Tensor] = {}
    for name, target in targets.items():
        try:
            tensor, row = _fit_one(name, target, named, model, embedding, bias)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        report.rows.append(row)
        if tensor is not None:
            fitted[name] = tensor
    for name in [name for name in named if name not in targets]:
        if _is_buffer(name, targets):
            report.rows.append(Row(name, "dropped", tuple(named[name].shape), None, "buffer, computed here"))
        else:
            problems.append(f"{name} {list(named[name].shape)}: the model has no such tensor")
    report.rows += [Row(name, "dropped", None, None, reason) for name, reason in beside.items()]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        listed = "; ".join(problems[:3])
        raise CheckpointError(f"{source}: the {layout} checkpoint does not fit {model.settings['name']}: {listed}{more}")
    if not dry_run:
        _copy(fitted, model)
    return report


def _renamed(state: Mapping[str, Tensor], layout: str) -> tuple[dict[str, Tensor], list[str]]:
    """Put the tensors under this package's names; returns them, and what two names of the file both claim to be."""
    named: dict[str, Tensor] = {}
    problems = []
    for theirs, tensor in state.items():
        name = to_native(theirs, layout)
        if name in named:
            problems.append(f"{theirs} {list(tensor.shape)}: a second tensor that means {name}")
        named[name] = tensor
    return named, problems


def _unfit_values(name: str, tensor: Tensor, dry_run: bool) -> str | None:
    """Say what keeps a tensor from being a weight, if anything; a dry run has no values to look at."""
    if name.rsplit(".", 1)[-1] in (INDEX, MASK):
        return None
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        return f"{name} {list(tensor.shape)}: {tensor.dtype} {tensor.layout} is not a dense floating-point weight"
    if dry_run:
        return None
    if tensor.is_meta:
        return f"{name} {list(tensor.shape)}: has a shape but no values (meta device)"
    count = int((~torch.isfinite(tensor)).sum())
    return f"{name} {list(tensor.shape)}: {count} values are NaN or infinite" if count else None


def _is_buffer(name: str, targets: Mapping[str, Tensor]) -> bool:
    """Say whether a tensor is the index of a table that the model has, or the mask of a block that it has."""
    owner, _, last = name.rpartition(".")
    return (last == INDEX and f"{owner}.{TABLE}" in targets) or (last == MASK and f"{owner}.norm1.weight" in targets)


def _copy(fitted: Mapping[str, Tensor], model: VideoSwin) -> None:
    parameters = dict(model.named_parameters())
    if any(p.is_meta for p in parameters.values()):
        raise CheckpointError("the model is on the meta device: only a dry run can load into it")
    with torch.no_grad():
        for name, tensor in fitted.items():
            parameters[name].copy_(tensor)


def _fit_one(
    name: str, target: Tensor, named: Mapping[str, Tensor], model: VideoSwin, embedding: str, bias: str
) -> tuple[Tensor | None, Row]:
    """Fit one tensor of the model; returns what to copy (None: keep the fresh one) and its row of the report."""
    want = tuple(target.shape)
    have = named.get(name)
    flat = is_2d(named)
    if name in HEAD:
        return _fit_head(name, want, named, flat)
    if have is None:
        if any(part in name for part in NEW_IN_DESIGN):
            return None, Row(name, "fresh", None, want, "temporal layers of this design")
        raise CheckpointError(f"{name} {list(want)}: absent from the checkpoint")
    shape = tuple(have.shape)
    if name == KERNEL and flat:
        return _inflate_kernel(have, want, embedding)
    if name.endswith(TABLE) and not any(part in name for part in NEW_IN_DESIGN):
        index = named.get(name.replace(TABLE, INDEX))
        return fit_table(name, have, want, index, model.architecture.attention_window, flat, bias)
    if shape != want:
        raise CheckpointError(f"{name}: {list(shape)} in the checkpoint, {list(want)} in the model")
    return have, Row(name, "taken", shape, want)


def _fit_head(name: str, want: tuple[int, ...], named: Mapping[str, Tensor], flat: bool) -> tuple[Tensor | None, Row]:
    """Fit weight or bias of the classifier, which are taken together or not at all."""
    weight, bias = (named.get(part) for part in HEAD)
    if weight is None and bias is None:
        return None, Row(name, "fresh", None, want, "the checkpoint has no classifier")
    if weight is None or bias is None or weight.shape[:1] != bias.shape or weight.dim() != 2:
        shapes = [None if part is None else list(part.shape) for part in (weight, bias)]
        raise CheckpointError(f"{name}: the classifier's weight {shapes[0]} and bias {shapes[1]} do not belong together")
    shape = tuple(named[name].shape)
    if flat:
        return None, Row(name, "fresh", shape, want, "classifier of images, not of videos")
    if shape == want:
        return named[name], Row(name, "taken", shape, want)
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
        out = have.unsqueeze(2).expand(want)
        if not out.is_meta:  # where a division would import PyTorch's compiler, some two seconds
            out = out / frames
        return out, Row(KERNEL, "inflated", shape, want, f"repeated over {frames} frames, divided by {frames}")
    out = torch.zeros(want, dtype=have.dtype, device=have.device)
    out[:, :, frames // 2] = have
    return out, Row(KERNEL, "inflated", shape, want, f"in slice {frames // 2} of {frames}, zeros elsewhere")
