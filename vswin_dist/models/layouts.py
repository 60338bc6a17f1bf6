"""The checkpoint layouts of the Swin family: recognised by content, translated to this package's names, and back.

Layouts: ``official`` (published video code: ``backbone.``, ``cls_head.fc_cls.``), ``torchvision`` (swin3d_*),
``microsoft2d`` and ``timm2d`` (image models), ``native`` (ours). Every rule renames only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

from torch import Tensor

from vswin_dist.errors import CheckpointError, ConfigError

from .swin3d import VideoSwin
from .windows import bias_index

WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
EXPORTS = ("official", "torchvision", "native", "microsoft2d")


def unwrap(content: Any, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The flat name -> tensor dict inside a loaded file, and what lay beside it (name -> what it is).

    Raises CheckpointError where there is no such dict, where there are two, or where it holds something that may hide
    tensors.
    """
    beside: dict[str, str] = {}
    found = content
    while isinstance(found, Mapping) and not any(isinstance(v, Tensor) for v in found.values()):
        inner = [key for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        if not inner:
            raise CheckpointError(
                f"{source}: holds no tensors, alone or under {', '.join(WRAPPERS)}; its keys: {_some(found)}"
            )
        if len(inner) > 1:
            raise CheckpointError(f"{source}: holds weights under {' and '.join(inner)}: save the one to load alone")
        beside |= {str(k): f"{type(v).__name__} beside the weights" for k, v in found.items() if k != inner[0]}
        found = found[inner[0]]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{source}: a {type(found).__name__}, not a dict of tensors")
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    for name, value in found.items():
        if not isinstance(value, (Tensor, int, float, str, NoneType)):
            raise CheckpointError(f"{source}: {name} is a {type(value).__name__} among the tensors")
        if not isinstance(value, Tensor):
            beside[str(name)] = f"{type(value).__name__}, no tensor"
    if all(name.startswith("module.") for name in state):  # saved from a DistributedDataParallel wrapper
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state, beside


def recognise(state: Mapping[str, Tensor], source: str) -> str:
    """Layout of a flat state dict, by its names and by the rank of the patch kernel."""
    if any(name.startswith("backbone.") for name in state):
        return "official"
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None:
        raise CheckpointError(
            f"{source}: no known layout of a Swin model (no backbone.* and no patch_embed.proj.weight); "
            f"it has {_some(state)}"
        )
    if any(name.startswith("features.") for name in state):
        return "torchvision"
    if kernel.dim() == 5:
        return "native"
    timm = "head.fc.weight" in state or ("layers.0.downsample.norm.weight" not in state
                                         and "layers.1.downsample.norm.weight" in state)  # fmt: skip
    return "timm2d" if timm else "microsoft2d"


def is_2d(state: Mapping[str, Tensor]) -> bool:
    """True for the weights of an image model (after `to_native`)."""
    kernel = state.get("patch_embed.proj.weight")
    return kernel is not None and kernel.dim() == 4


def to_native(name: str, layout: str) -> str:
    """This package's name of a tensor of another layout."""
    if layout == "official":
        return re.sub(r"^cls_head\.fc_cls\.", "head.", name).removeprefix("backbone.")
    if layout == "timm2d":
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)
        return re.sub(r"^head\.fc\.", "head.", name)
    if layout == "torchvision":
        found = re.match(r"^features\.(\d+)\.(.*)$", name)
        if not found:
            return name
        stage, rest = divmod(int(found[1]), 2), found[2]
        if stage[1]:
            return f"layers.{stage[0]}.downsample.{rest}"
        rest = rest.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")
        return f"layers.{stage[0]}.blocks.{rest}"
    return name


def from_native(name: str, layout: str) -> str:
    """The name in ``official`` or ``torchvision`` of a tensor of ours; other layouts keep it."""
    if layout == "official":
        return f"cls_head.fc_cls.{name[5:]}" if name.startswith("head.") else f"backbone.{name}"
    if layout == "torchvision":
        found = re.match(r"^layers\.(\d+)\.(blocks|downsample)\.(.*)$", name)
        if not found:
            return name
        stage = int(found[1])
        if found[2] == "downsample":
            return f"features.{2 * stage + 1}.{found[3]}"
        return f"features.{2 * stage}." + found[3].replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.3.")
    return name


def export_state(model: VideoSwin, layout: str = "official") -> dict[str, Tensor]:
    """The weights as a flat dict in another layout, on the CPU, index buffers included where the layout has them.

    ``microsoft2d`` is for a model with temporal patch 1 and temporal window 1, which is an image model.
    Raises ConfigError for an unknown layout or a model that the layout cannot hold.
    """
    a = model.architecture
    if layout not in EXPORTS:
        raise ConfigError(f"layout={layout!r} is not one of {', '.join(EXPORTS)}")
    if layout != "native" and a.attention_design != "joint":
        raise ConfigError(f"layout {layout} has no place for the temporal layers of {a.attention_design}: use native")
    if layout == "microsoft2d" and (a.patch_size[0] != 1 or a.window_size[0] != 1):
        raise ConfigError(
            f"layout microsoft2d holds image models: temporal patch 1 and window 1, not patch {a.patch_size} "
            f"and window {a.window_size}"
        )
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if layout == "microsoft2d" and name == "patch_embed.proj.weight":
            tensor = tensor[:, :, 0].contiguous()
        state[from_native(name, layout)] = tensor
        if layout != "native" and name.endswith("relative_position_bias_table"):
            index = bias_index(a.window_size, a.window_size, "offset", tensor.device)
            side = a.window_size[0] * a.window_size[1] * a.window_size[2]
            index_name = name.replace("relative_position_bias_table", "relative_position_index")
            state[from_native(index_name, layout)] = index.view(side, side).clone()
    return state


def _some(names: Any, most: int = 5) -> str:
    """The first few names, for an error."""
    listed = [str(name) for name in names] if isinstance(names, Mapping) else [type(names).__name__]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
