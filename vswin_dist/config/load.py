"""From a recipe's name and ``key=value`` overrides to checked `Settings`."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vswin_dist.config.schema import Settings
from vswin_dist.errors import ConfigError, nearest

GROUPS: dict[str, Any] = {
    name: hint for name, hint in typing.get_type_hints(Settings).items() if dataclasses.is_dataclass(hint)
}
KEYS: dict[str, Any] = {
    f"{group}.{key}": hint for group, cls in GROUPS.items() for key, hint in typing.get_type_hints(cls).items()
}
CHOICES = {
    "data.sampling": ("dense", "uniform", None),
    "data.flip_labels": ("mirror", "keep"),
    "data.balance": ("none", "class"),
    "data.pixel_format": ("rgb", "yuv"),
    "optim.param_groups": ("clean", "official", "mmaction2"),
    "optim.schedule": ("step", "epoch"),
    "training.precision": ("bf16", "fp32"),
    "training.zero_stage": (0, 1, 2, 3),
    "model.inflate_embedding": ("inflate", "centre"),
    "model.inflate_bias": ("duplicate", "centre"),
    "model.attention_design": ("joint", "split", "factorized"),
    "model.shift": ("3d", "spatial", "none"),
    "model.bias_index": ("offset", "official"),
    "model.gradient_checkpointing": ("none", "block", "stage", "selective"),
    "model.attention_kernel": ("plain", "triton"),
}
REQUIRED = {f"{group}.{f.name}" for group, cls in GROUPS.items() for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING}
AT_LEAST_ONE = (
    "data.frames", "data.stride", "data.size", "data.short_side", "training.workers", "training.min_workers",
    "training.epochs", "training.max_steps", "training.global_batch", "training.micro_batch", "training.checkpoint_every",
    "training.keep_checkpoints", "evaluation.every_epochs", "evaluation.clips", "evaluation.crops",
    "evaluation.batch", "data.prefetch", "data.repeats", "model.patch_size", "model.window_size",
)
# What is allowed, in words -> the test, and the settings that it holds for (each item of those that are lists).
BOUNDS: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "1 or more": (lambda v: v >= 1, AT_LEAST_ONE),
    "0 or more": (lambda v: v >= 0, (
        "run.seed", "model.inflate_noise", "data.rand_augment_ops", "data.mixup", "data.cutmix", "data.workers",
        "data.cache_gb", "training.max_failures", "optim.backbone_ratio", "optim.weight_decay", "optim.warmup_epochs",
        "optim.gradient_clipping")),
    "more than 0": (lambda v: v > 0, ("data.crop_ratio", "data.std", "training.cpus_per_worker", "optim.lr", "optim.eps")),
    "from 0 to 1": (lambda v: 0 <= v <= 1, ("data.flip", "data.erasing", "data.max_bad_samples", "optim.warmup_start")),
    "from 0 up to, not including, 1": (lambda v: 0 <= v < 1, (
        "model.drop_path_rate", "model.head_dropout", "optim.betas", "optim.label_smoothing")),
    "more than 0, up to 1": (lambda v: 0 < v <= 1, ("data.crop_scale", "data.subset")),
    "from 0 to 30": (lambda v: 0 <= v <= 30, ("data.rand_augment_magnitude",)),
    "a finite number": (math.isfinite, ("data.mean",)),
}
ALLOWED = {key: (words, holds) for words, (holds, keys) in BOUNDS.items() for key in keys}
LENGTHS = {"data.crop_scale": 2, "data.crop_ratio": 2, "optim.betas": 2, "data.mean": 3, "data.std": 3,
           "model.patch_size": 3, "model.window_size": 3}
ORDERED = ("data.crop_scale", "data.crop_ratio")  # from the least to the most


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("vswin_dist.config") / "recipes"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def recipe_text(name_or_path: str) -> str:
    """The YAML text of a recipe that comes with the package, or of a user's own file.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"recipe file {name_or_path!r} does not exist")
        return path.read_text()
    if name_or_path not in recipe_names():
        raise ConfigError(f"unknown recipe {name_or_path!r}.{nearest(name_or_path, recipe_names())} "
                          f"There are: {', '.join(recipe_names())}")
    return (resources.files("vswin_dist.config") / "recipes" / f"{name_or_path}.yaml").read_text()


def load_settings(recipe: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a recipe with ``key=value`` overrides, the values read as YAML.

    Raises:
        ConfigError: an unknown key (names the nearest), a value of the wrong type or out of its bounds, or values that
            do not go together.
    """
    values = yaml.safe_load(recipe_text(recipe)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {recipe!r} is no list of 'group.field: value' lines")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is no setting: write key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {text!r} cannot be read: {error}") from error
    return from_flat(values, recipe)


def from_flat(values: Mapping[str, Any], recipe: str = "") -> Settings:
    """Settings from ``{"group.field": value}``; the inverse of `to_flat`."""
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, value in values.items():
        if key not in KEYS:
            raise ConfigError(f"unknown setting {key!r}.{nearest(key, KEYS)}")
        if value is None and key in REQUIRED:
            continue
        group, field = key.split(".", 1)
        groups[group][field] = _check(key, _convert(key, value, KEYS[key]))
    for key in sorted(REQUIRED):
        group, field = key.split(".", 1)
        if field not in groups[group]:
            raise ConfigError(f"{key} is not set: give {key}=...")
    settings = Settings(**{group: cls(**groups[group]) for group, cls in GROUPS.items()}, recipe=recipe)
    _check_together(settings)
    return settings


def to_flat(settings: Settings) -> dict[str, Any]:
    """``{"group.field": value}`` of all settings, tuples as lists."""
    flat = {}
    for group in GROUPS:
        for key, value in dataclasses.asdict(getattr(settings, group)).items():
            flat[f"{group}.{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; ConfigError where it is of another."""
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}={value!r}: expected a list such as [8, 7, 7]")
        return tuple(_convert(key, v, typing.get_args(hint)[0]) for v in value)
    if hint is float and isinstance(value, str):
        try:  # YAML reads 1e-3 as text
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if type(value) is not hint:
        raise ConfigError(f"{key}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    return value


def _check(key: str, value: Any) -> Any:
    if key in CHOICES and value not in CHOICES[key]:
        hint = nearest(str(value), [str(c) for c in CHOICES[key]])
        raise ConfigError(f"{key}={value!r}: expected one of {', '.join(map(str, CHOICES[key]))}.{hint}")
    if value is None:
        return value
    shown = list(value) if isinstance(value, tuple) else value
    if key in LENGTHS and len(value) != LENGTHS[key]:
        raise ConfigError(f"{key}={shown!r}: expected {LENGTHS[key]} values, got {len(value)}")
    if key in ALLOWED:
        words, holds = ALLOWED[key]
        if not all(math.isfinite(v) and holds(v) for v in (value if isinstance(value, tuple) else (value,))):
            raise ConfigError(f"{key}={shown!r}: expected {words}")
    if key in ORDERED and value[0] > value[1]:
        raise ConfigError(f"{key}={shown!r}: the first is the least, the second the most")
    if key == "run.name" and not re.fullmatch(r"[\w\- ][\w\-. ]*", value):
        raise ConfigError(f"run.name={value!r}: letters, digits, '_', '-', '.' and spaces; it names a folder")
    if key == "data.classes" and not value:
        raise ConfigError("data.classes=[] leaves nothing to train on: name classes, or null for all")
    return value


def _check_together(s: Settings) -> None:
    """Refuse values that are right alone and wrong together."""
    if s.optim.warmup_epochs > s.training.epochs:
        raise ConfigError(f"optim.warmup_epochs={s.optim.warmup_epochs:g} is longer than the training of "
                          f"training.epochs={s.training.epochs}: lower the one or raise the other")
    if s.training.min_workers and s.training.min_workers > s.training.workers:
        raise ConfigError(f"training.min_workers={s.training.min_workers} is more than "
                          f"training.workers={s.training.workers}: lower the one or raise the other")
    if s.model.compile and s.training.zero_stage == 3:
        raise ConfigError("model.compile=true with training.zero_stage=3: the graph cannot hold weights that come and go; "
                          "take stage 2 or model.compile=false")
    if s.model.attention_kernel == "triton" and not s.training.use_gpu:
        raise ConfigError("model.attention_kernel=triton with training.use_gpu=false: the kernel computes on CUDA devices; "
                          "take training.use_gpu=true or model.attention_kernel=plain")
    if s.data.pixel_format == "yuv" and s.data.size % 2:
        raise ConfigError(f"data.pixel_format=yuv needs an even data.size, not {s.data.size}: chroma planes have half of it")
