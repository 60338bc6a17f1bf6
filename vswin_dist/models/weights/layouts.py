"""The checkpoint layouts of the Swin family: recognised by content, translated to this package's names, and back.

Layouts: `official` (published video code: `backbone.`, `cls_head.fc_cls.`), `torchvision` (swin3d_*),
`microsoft2d` and `timm2d` (image models), `native` (ours). Every rule renames only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any

from torch import Tensor

from vswin_dist.errors import CheckpointError, ConfigError
from vswin_dist.models.swin.model import VideoSwin
from vswin_dist.models.swin.windows import bias_index

KERNEL = "patch_embed.proj.weight"  # every layout has it, under some prefix
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
EMA = re.compile(r"(^|[_.])(ema|teacher|averaged)([_.]|$)")  # in the key or prefix of an averaged copy of the weights
TRANSPARENT = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # DDP, compile, FSDP
COUNTERS = {"total_ops", "total_params", "n_averaged", "num_updates", "num_batches_tracked", "steps", "decay"}
EXPORTS = ("official", "torchvision", "native", "microsoft2d", "timm2d")
IMAGE_LAYOUTS = ("microsoft2d", "timm2d")


def unwrap(content: Any, source: str, ema: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find the flat name -> tensor dict inside a loaded file, and what lay beside it (name -> what it is).

    What training puts before the names is taken off: wrappers such as DDP and `torch.compile`, and the attribute that
    held the model (`model.`, `encoder.`). With `ema` the averaged copy of the weights is found, else the weights.

    Raises:
        CheckpointError: there is no such dict, there are two, or it holds something that may hide tensors.
    """
    beside: dict[str, str] = {}
    found = content
    averaged = False  # whether what was found is a copy
    while isinstance(found, Mapping) and not any(isinstance(v, Tensor) for v in found.values()):
        key = _wrapper(found, source, ema and not averaged)
        averaged |= key not in WRAPPERS
        beside |= {str(k): f"{type(v).__name__} beside the weights" for k, v in found.items() if k != key}
        found = found[key]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{source}: a {type(found).__name__}, not a dict of tensors")
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    for name, value in found.items():
        if not isinstance(value, (Tensor, int, float, str, NoneType)):
            raise CheckpointError(f"{source}: {name} is a {type(value).__name__} among the tensors")
        if not isinstance(value, Tensor):
            beside[str(name)] = f"{type(value).__name__}, not a tensor"
    counters = [name for name, v in state.items() if v.numel() == 1 and name.rpartition(".")[2] in COUNTERS]
    beside |= dict.fromkeys(counters, "counter, not a weight")
    for name in counters:
        del state[name]
    return _unprefixed(_without_wrappers(state, source), beside, source, None if averaged else ema)


def _wrapper(found: Mapping[Any, Any], source: str, ema: bool) -> str:
    """Choose the key under which the weights are, or with `ema` the copy or what may hold it."""
    dicts = [str(key) for key, value in found.items() if isinstance(value, Mapping) and value]
    plain = [key for key in WRAPPERS if key in dicts]
    copies = [key for key in dicts if key not in WRAPPERS and EMA.search(key)]
    inner = (copies or plain) if ema else plain
    if not inner:
        hint = _only_copies(copies) if copies else f"alone or under {', '.join(WRAPPERS)}; its keys: {_some(found)}"
        raise CheckpointError(f"{source}: holds no tensors, {hint}")
    if len(inner) > 1:
        raise CheckpointError(f"{source}: holds weights under {' and '.join(inner)}: save the one to load alone")
    return inner[0]


def _without_wrappers(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Take the parts of names that wrappers of modules add, wherever they stand."""
    named: dict[str, Tensor] = {}
    for theirs, tensor in state.items():
        name = ".".join(part for part in theirs.split(".") if part not in TRANSPARENT)
        if name in named:
            raise CheckpointError(f"{source}: {theirs} {list(tensor.shape)}: a second tensor that means {name}")
        named[name] = tensor
    return named


def _unprefixed(
    state: dict[str, Tensor], beside: dict[str, str], source: str, ema: bool | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take off the prefix of the model, or with `ema` of its copy (None: there are no copies); other names stay."""
    kernels = [name for name in state if name == KERNEL or name.endswith(f".{KERNEL}")]
    prefixes = {name.removesuffix(KERNEL).removesuffix("backbone.") for name in kernels}
    copies = set() if ema is None else {prefix for prefix in prefixes if EMA.search(prefix)}
    chosen = copies if ema else prefixes - copies
    if ema and not copies:
        raise CheckpointError(f"{source}: holds no EMA copy of the weights: leave model.init_ema=false")
    if copies and not chosen:
        raise CheckpointError(f"{source}: holds no weights, {_only_copies(copies)}")
    if len(chosen) > 1:
        listed = " and ".join(f"{prefix}*" for prefix in sorted(chosen))
        raise CheckpointError(f"{source}: holds weights under {listed}: save the one to load alone")
    found: dict[str, Tensor] = {}
    others: Counter[str] = Counter()
    for name, tensor in state.items():
        owner = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if owner is not None and owner not in chosen:
            others[owner] += 1
            continue
        short = name.removeprefix(owner or "")
        if short in found:
            raise CheckpointError(f"{source}: {name} {list(tensor.shape)}: a second tensor that means {short}")
        found[short] = tensor
    what = "the weights, not their EMA copy" if ema else "an EMA copy of the weights"
    return found, beside | {f"{prefix}*": f"{count} tensors of {what}" for prefix, count in others.items()}


def _only_copies(names: Iterable[str]) -> str:
    return f"but an EMA copy of weights under {' and '.join(sorted(names))}: model.init_ema=true takes it"


def recognise(state: Mapping[str, Tensor], source: str) -> str:
    """Recognise the layout of a flat state dict, by its names and by the rank of the patch kernel.

    Raises:
        CheckpointError: the names are not those of a Swin model.
    """
    if any(name.startswith("backbone.") for name in state):
        return "official"
    kernel = state.get(KERNEL)
    if kernel is None:
        raise CheckpointError(
            f"{source}: not a known layout of a Swin model (no backbone.* and no {KERNEL}); it has {_some(state)}"
        )
    if any(name.startswith("features.") for name in state):
        return "torchvision"
    if kernel.dim() == 5:
        return "native"
    merges = [f"layers.{stage}.downsample.norm.weight" in state for stage in (0, 1)]  # timm merges before a stage
    return "timm2d" if "head.fc.weight" in state or merges == [False, True] else "microsoft2d"


def is_2d(state: Mapping[str, Tensor]) -> bool:
    """Say whether these are the weights of an image model (after `to_native`)."""
    kernel = state.get(KERNEL)
    return kernel is not None and kernel.dim() == 4


def to_native(name: str, layout: str) -> str:
    """Translate the name of a tensor of another layout to this package's."""
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
    """Translate the name of a tensor of ours to another layout's."""
    if layout == "official":
        return f"cls_head.fc_cls.{name[5:]}" if name.startswith("head.") else f"backbone.{name}"
    if layout == "timm2d":
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)
        return re.sub(r"^head\.", "head.fc.", name)
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
    """Return the weights as a flat dict in another layout, on the CPU, index buffers included where the layout has them.

    `microsoft2d` and `timm2d` are for a model with temporal patch 1 and temporal window 1, which is an image model.

    Raises:
        ConfigError: an unknown layout, or a model that the layout cannot hold.
    """
    a = model.architecture
    if layout not in EXPORTS:
        raise ConfigError(f"layout={layout!r} is not one of {', '.join(EXPORTS)}")
    if layout != "native" and a.attention_design != "joint":
        raise ConfigError(f"layout {layout} has no names for the temporal layers of {a.attention_design}: use native")
    if layout in IMAGE_LAYOUTS and (a.patch_size[0] != 1 or a.window_size[0] != 1):
        raise ConfigError(
            f"layout {layout} holds image models: temporal patch 1 and window 1, not patch {a.patch_size} "
            f"and window {a.window_size}"
        )
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        if layout in IMAGE_LAYOUTS and name == KERNEL:
            tensor = tensor[:, :, 0].contiguous()
        state[from_native(name, layout)] = tensor
        if layout not in ("native", "timm2d") and name.endswith("relative_position_bias_table"):
            index = bias_index(a.window_size, a.window_size, "offset", tensor.device)
            side = a.window_size[0] * a.window_size[1] * a.window_size[2]
            index_name = name.replace("relative_position_bias_table", "relative_position_index")
            state[from_native(index_name, layout)] = index.view(side, side).clone()
    return state


def _some(names: Any, most: int = 5) -> str:
    """Return the first few names, for an error."""
    listed = [str(name) for name in names] if isinstance(names, Mapping) else [type(names).__name__]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
