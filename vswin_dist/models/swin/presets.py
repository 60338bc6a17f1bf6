"""Named architectures and the checking of their settings.

Source: Video Swin paper, section 3.3 (T, S, B, L), table 4 to 6 (ablations); swin_nano is this project's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vswin_dist.choices import AttentionDesign, AttentionKernel, BiasIndex, GradientCheckpointing, Shift
from vswin_dist.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """Everything that defines a model. Sizes are in pixels and frames (patch) or tokens (window)."""

    num_classes: int = 400
    patch_size: tuple[int, int, int] = (2, 4, 4)
    window_size: tuple[int, int, int] = (8, 7, 7)
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    drop_path_rate: float = 0.1
    head_dropout: float = 0.5
    attention_design: AttentionDesign = "joint"
    shift: Shift = "3d"
    bias_index: BiasIndex = "offset"
    gradient_checkpointing: GradientCheckpointing = "none"
    compile: bool = False
    attention_kernel: AttentionKernel = "auto"

    @property
    def attention_window(self) -> tuple[int, int, int]:
        """Window of the windowed attention: one frame where time has layers of its own (table 4)."""
        return self.window_size if self.attention_design == "joint" else (1, *self.window_size[1:])


_HINTS = get_type_hints(Architecture)
_DEEP = (2, 2, 18, 2)
PRESETS: dict[str, Architecture] = {
    # Windows of 4 x 4 fit its small inputs: at 32 pixels, 7 x 7 would compute three tokens of padding for each real one.
    "swin_nano": Architecture(embed_dim=48, depths=(2, 2, 2), num_heads=(3, 6, 12), window_size=(8, 4, 4)),
    "swin_t": Architecture(),
    "swin_s": Architecture(depths=_DEEP),
    "swin_b": Architecture(embed_dim=128, depths=_DEEP, num_heads=(4, 8, 16, 32), drop_path_rate=0.3),
    "swin_l": Architecture(embed_dim=192, depths=_DEEP, num_heads=(6, 12, 24, 48), drop_path_rate=0.4),
}


def resolve(name: str, num_classes: int, overrides: dict[str, Any]) -> Architecture:
    """Return the preset `name` with overrides, checked.

    Raises ConfigError for an unknown preset or setting (naming the nearest), or a value that cannot be.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}{_nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    known = [f.name for f in fields(Architecture) if f.name != "num_classes"]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"unknown model setting {key!r}{_nearest(key, known)}; there are {', '.join(known)}")
    values = {key: _checked(key, value) for key, value in {**overrides, "num_classes": num_classes}.items()}
    architecture = replace(PRESETS[name], **values)
    _check_stages(architecture)
    return architecture


def settings_of(name: str, architecture: Architecture) -> dict[str, Any]:
    """JSON-able settings such that `build_model(**settings)` gives the same architecture.

    The attention kernel is no part of them: it belongs to the device, and the model may go to another.
    """
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(architecture).items()}
    del plain["attention_kernel"]
    return {"name": name, **plain}


def _nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _checked(key: str, value: Any) -> Any:
    if get_origin(_HINTS[key]) is Literal:
        choices = get_args(_HINTS[key])
        if value not in choices:
            raise ConfigError(f"{key}={value!r} is not one of {', '.join(choices)}{_nearest(str(value), choices)}")
        return value
    if key in ("drop_path_rate", "head_dropout"):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise ConfigError(f"{key}={value!r} must be a number from 0 up to, not including, 1")
        return float(value)
    if key == "compile":
        if not isinstance(value, bool):
            raise ConfigError(f"compile={value!r} must be true or false")
        return value
    if key in ("num_classes", "embed_dim"):
        return _positive(key, value)
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{key}={value!r} must be a sequence of positive integers")
    if key in ("patch_size", "window_size") and len(value) != 3:
        raise ConfigError(f"{key}={value!r} must have three numbers: time, height, width")
    return tuple(_positive(key, item) for item in value)


def _positive(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} must be made of positive integers, not {value!r}")
    return value


def _check_stages(a: Architecture) -> None:
    if len(a.depths) != len(a.num_heads):
        raise ConfigError(f"depths {a.depths} and num_heads {a.num_heads} must name equally many stages")
    for stage, heads in enumerate(a.num_heads):
        dim = a.embed_dim << stage
        if dim % heads:
            raise ConfigError(
                f"stage {stage + 1}: {dim} channels (embed_dim {a.embed_dim} x {1 << stage}) do not divide "
                f"into {heads} heads"
            )
