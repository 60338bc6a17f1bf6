"""Read a checkpoint file of any layout into a model."""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vswin_dist.errors import CheckpointError
from vswin_dist.models.swin.model import VideoSwin
from vswin_dist.models.weights.inflate import fit
from vswin_dist.models.weights.layouts import recognise, unwrap
from vswin_dist.models.weights.load_report import LoadReport

# safetensors' names of the types a weight may have
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_pretrained(
    model: VideoSwin,
    path_or_uri: str | Path,
    *,
    embedding: str = "inflate",
    bias: str = "duplicate",
    ema: bool = False,
    dry_run: bool = False,
) -> LoadReport:
    """Load a checkpoint of any Swin layout, recognised by its content; returns what became of each tensor.

    Takes torch and safetensors files, local or at any fsspec URL: published video checkpoints, torchvision
    swin3d, Microsoft and timm image models (inflated, see `inflate`), and our own. Bias tables of another
    window are resized; a classifier of another class count stays fresh. With `ema` the averaged copy of the weights is
    taken, which a file may hold beside them. With `dry_run` shapes are checked and
    nothing is loaded: the model may be on the meta device.

    Raises:
        CheckpointError: a file that is absent, is damaged, would execute code, or holds a tensor that cannot be
            explained (named with both shapes).
    """
    source = str(path_or_uri)
    with _local(source) as path:
        content = _read(path, source, "meta" if dry_run else "cpu")
    state, beside = unwrap(content, source, ema)
    layout = recognise(state, source)
    return fit(state, model, layout, source, beside, embedding=embedding, bias=bias, dry_run=dry_run)


@contextmanager
def _local(source: str) -> Iterator[Path]:
    """Yield the file on this machine, fetched from a URL first where need be."""
    if "://" not in source:
        path = Path(os.path.expanduser(source))
        if not path.is_file():
            raise CheckpointError(f"{source}: no such file")
        yield path
        return
    from vswin_dist import storage

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        storage.get_file(source, path)
        yield path


def _read(path: Path, source: str, device: str) -> Any:
    """Read the content of a torch or safetensors file, distinguished by the first bytes; never executes code."""
    with path.open("rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{":  # eight bytes of length, then a JSON header
        try:
            return _read_safetensors(path, device)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{source}: damaged safetensors file: {error}") from error
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{source}: refused, since reading it would execute code{f' ({code[1]})' if code else ''}, or it is damaged. "
            "Save its tensors alone (torch.save of a state dict, or safetensors)."
        ) from error
    except Exception as error:  # damage shows as almost any of them, from struct.error to AssertionError
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{source}: damaged, or neither a torch nor a safetensors file: {what}") from error


def _read_safetensors(path: Path, device: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        if device != "meta":
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: torch.empty(part.get_shape(), dtype=FLOATS.get(part.get_dtype(), torch.int64), device="meta")
            for name, part in parts.items()
        }
