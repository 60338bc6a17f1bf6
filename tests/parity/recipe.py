"""Synthetic weights and inputs that anyone can regenerate from names (recipe v1 of the reference fixtures)."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vswin_dist.models import VideoSwin
from vswin_dist.models.weights.layouts import from_native


def reference_folder() -> Path | None:
    """The full fixtures: VSWIN_REFERENCE, else ../shared/reference beside the repository, else None."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "reference"
    folder = Path(os.environ.get("VSWIN_REFERENCE") or beside)
    return folder if (folder / "variants.json").is_file() else None


def recipe(name: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor of a name and shape: standard normal from the name's CRC, scaled by its kind."""
    z = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    if name.endswith("relative_position_bias_table"):
        z = 0.5 * z
    elif name.endswith(".weight") and len(shape) == 1:
        z = 1.0 + 0.02 * z
    elif not name.startswith("input/"):
        z = 0.02 * z
    return torch.from_numpy(z.astype(np.float32))


def fill(model: VideoSwin) -> VideoSwin:
    """Give a model the recipe's weights under their names in the published video layout."""
    state = {k: recipe(from_native(k, "official"), tuple(v.shape)) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()
