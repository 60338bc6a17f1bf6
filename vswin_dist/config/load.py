"""From a recipe's name and `key=value` overrides to checked `Settings`."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vswin_dist.config.ablations import ROWS, row_text
from vswin_dist.config.rules import Rule, rules_of
from vswin_dist.config.schema import Settings
from vswin_dist.errors import ConfigError, nearest

GROUPS: dict[str, Any] = {
    name: hint for name, hint in typing.get_type_hints(Settings).items() if dataclasses.is_dataclass(hint)
}
KEYS = [f"{group}.{f.name}" for group, cls in GROUPS.items() for f in dataclasses.fields(cls)]
RECIPES = resources.files("vswin_dist.config") / "recipes"
LIKELY_TEXT = re.compile(r"[ \t]+#[^\s#]")  # a comment to YAML, and perhaps a part of the text before it to its writer


def recipe_names() -> list[str]:
    """Name the recipes that come with the package: its files, and the rows of the paper's ablations."""
    return sorted([*_files(), *(row.recipe for row in ROWS)])


def recipe_text(name_or_path: str) -> str:
    """Return the YAML text of a recipe that comes with the package, or of a user's own file.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"recipe file {name_or_path!r} does not exist")
        return path.read_text()
    for row in ROWS:
        if row.recipe == name_or_path:
            return row_text(row, recipe_text(row.base))
    if name_or_path not in _files():
        raise ConfigError(
            f"unknown recipe {name_or_path!r}.{nearest(name_or_path, recipe_names())} There are: {', '.join(recipe_names())}"
        )
    return (RECIPES / f"{name_or_path}.yaml").read_text()


def load_settings(recipe: str, overrides: Sequence[str] = ()) -> Settings:
    """Load the settings of a recipe with `key=value` overrides; each value is read by the type of its field.

    Raises:
        ConfigError: an unknown key (names the nearest), a value of the wrong type or out of its bounds, or values that
            do not go together.
    """
    texts = _read_recipe(recipe)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not a setting: write key=value")
        texts[key.strip()] = None if text == "null" else text
    return from_flat({key: rule(key).read(text) for key, text in texts.items()}, recipe)


def from_flat(values: Mapping[str, Any], recipe: str = "") -> Settings:
    """Make settings of `{"group.field": value}`; the inverse of `to_flat`. What is absent has its default.

    Raises:
        ConfigError: as `load_settings`.
    """
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, value in values.items():
        required = rule(key).required
        if value is None and required:
            continue
        group, field = key.split(".", 1)
        groups[group][field] = tuple(value) if isinstance(value, list) else value
    return Settings(**{group: cls(**groups[group]) for group, cls in GROUPS.items()}, recipe=recipe)


def to_flat(settings: Settings) -> dict[str, Any]:
    """Flatten settings to `{"group.field": value}`, tuples as lists."""
    flat = {}
    for group in GROUPS:
        for key, value in dataclasses.asdict(getattr(settings, group)).items():
            flat[f"{group}.{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def defaults() -> dict[str, Any]:
    """Give the defaults of the settings that have one, as `to_flat` gives values."""
    found = {}
    for group, cls in GROUPS.items():
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                value = field.default
                found[f"{group}.{field.name}"] = list(value) if isinstance(value, tuple) else value
    return found


def rule(key: str) -> Rule:
    """Return what the type of a setting says.

    Raises:
        ConfigError: there is none of this name; names the nearest.
    """
    if key not in KEYS:
        raise ConfigError(f"unknown setting {key!r}.{nearest(key, KEYS)}")
    group, field = key.split(".", 1)
    return rules_of(GROUPS[group])[field]


def may_differ(key: str) -> bool:
    """Say whether a setting may differ when a run is resumed; any other makes it another run."""
    return rule(key).may_differ


def _files() -> list[str]:
    return [p.name.removesuffix(".yaml") for p in RECIPES.iterdir() if p.name.endswith(".yaml")]


def _read_recipe(recipe: str) -> dict[str, Any]:
    """Return the texts of a recipe's values, as they stand there: YAML's own types would make 42798 of `0123456`.

    A bare `null` is None; in quotes, it is a text.
    """
    source = recipe_text(recipe)
    try:
        root = yaml.compose(source, yaml.BaseLoader)
        texts = yaml.load(source, yaml.BaseLoader) or {}  # noqa: S506 # it makes nothing but texts and lists
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"recipe {recipe!r} cannot be read: put texts of other signs in quotes: {what}") from error
    if not isinstance(texts, dict):
        raise ConfigError(f"recipe {recipe!r} is not a list of 'group.field: value' lines")
    for key, value in root.value if root else ():
        if rule(key.value).is_text:
            _check_whole(value, source, recipe)
        if value.value == "null" and not value.style:
            texts[key.value] = None
    return texts


def _check_whole(node: yaml.Node, source: str, recipe: str) -> None:
    """Refuse a text of which YAML would keep a part for itself: `a` of `a #2`, `2` of `!run 2`."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_whole(item, source, recipe)
    elif isinstance(node, yaml.ScalarNode):
        start, end = node.start_mark, node.end_mark
        if source[start.index : start.index + 1] in ("!", "&") or (not node.style and LIKELY_TEXT.match(source, end.index)):
            line = source.splitlines()[start.line].strip()
            raise ConfigError(
                f"recipe {recipe!r}, line {start.line + 1}: of {line!r}, YAML would keep only {node.value!r}: "
                "put the text in quotes, and a space after the # of a comment"
            )
