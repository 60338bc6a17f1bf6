"""What the type of a field says: which values are allowed, how a text is read by it, and the words of a refusal.

The rules themselves are pydantic's; its JSON schema of a group of settings is what texts are read by and refusals are
worded from, so that both say what the types say.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs, ErrorDetails

from vswin_dist.errors import ConfigError, nearest

T = TypeVar("T")
MUTABLE = "may differ when a run is resumed"
Mutable = Annotated[T, MUTABLE]  # any other setting makes it another run

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Magnitude = Annotated[int, Field(ge=0, le=30)]  # of a RandAugment operation
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]  # of a whole, or a probability
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]  # what is left must not be nothing
Pair = TypeVar("Pair", bound=tuple[float, float])


def _ordered(pair: Pair) -> Pair:
    if pair[0] > pair[1]:
        raise ValueError("expected the lower bound first")
    return pair


def _names_a_folder(name: str) -> str:
    if not re.fullmatch(r"[\w\- ][\w\-.# ]*", name):
        raise ValueError("letters, digits, '_', '-', '.', '#' and spaces; it names a folder")
    return name


def _not_empty(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("leaves nothing to train on; name classes, or null for all")
    return names


def _patterns(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("name parameters or modules, or null for none")
    return names


def _range(text: str) -> str:
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError("expected FIRST..LAST, such as 11..13, the first step being 1")
    return text


Ordered = Annotated[Pair, AfterValidator(_ordered)]  # from the least to the most
FolderName = Annotated[str, AfterValidator(_names_a_folder)]
Names = Annotated[tuple[str, ...], AfterValidator(_not_empty)]
Patterns = Annotated[tuple[str, ...], AfterValidator(_patterns)]
StepRange = Annotated[str, AfterValidator(_range)]

BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # as YAML 1.1 has them
ONE = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
MANY = {"integer": "whole numbers", "number": "numbers", "string": "texts"}
ITEM = re.compile(r"""\s*(?:"((?:[^"]|"")*)"|'((?:[^']|'')*)'|([^,]*?))\s*(?:,|$)""")


@dataclass(frozen=True)
class Group:
    """Base of the groups of settings: a value that breaks its rule is a ConfigError, however the group is made."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, values: Any, validate: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            group: Any = cls  # mypy takes the hash of the instances for that of the class
            names: dict[int | str, str] = dict(enumerate(rules_of(group)))  # of the fields, by position
            rule = rules_of(group).get(names.get(first["loc"][0], str(first["loc"][0])))
            if rule is None:  # an argument that is not a field: the caller's mistake, not a user's
                raise
            raise ConfigError(rule.refusal(first, _given(group, values).get(rule.field))) from None


class Rule:
    """What the type of the setting `key` says."""

    def __init__(self, key: str, schema: dict[str, Any], required: bool, may_differ: bool) -> None:
        self.key = key
        self.field = key.partition(".")[2]
        self.may_differ = may_differ
        self.schema, *null = schema.get("anyOf", [schema])
        self.optional = bool(null)
        self.required = required
        self.default = schema.get("default")
        self.is_list = self.schema["type"] == "array"
        self.item = (self.schema.get("items") or self.schema["prefixItems"][0]) if self.is_list else self.schema
        self.is_text = self.item["type"] == "string" and "enum" not in self.item  # or a list of texts

    def read(self, given: Any) -> Any:
        """Read a text, or a list of texts, by the field's type; what cannot be read stays as it is, to be refused.

        None stands for a bare `null`: nothing where that is allowed, and for a setting without a default, which it
        leaves unset; else the text.

        Raises:
            ConfigError: a text is empty.
        """
        if given is None:
            if self.optional or self.required:
                return None
            given = "null"
        if not self.is_list:
            return self._read_one(given)
        items = _items(given) if isinstance(given, str) else given
        return [self._read_one(item) for item in items] if isinstance(items, list) else given

    def _read_one(self, given: Any) -> Any:
        if given == "":
            what = f"{self.key} holds an empty item" if self.is_list else f"{self.key} is empty"
            raise ConfigError(f"{what}: expected {self._expected()}")
        kind = self.item["type"]
        if not isinstance(given, str) or kind == "string":
            return given
        if kind == "boolean":
            return BOOLS.get(given.strip().lower(), given)
        try:
            return int(given) if kind == "integer" else float(given)
        except ValueError:
            return given

    def refusal(self, error: ErrorDetails, value: Any) -> str:
        """Say in one line why pydantic refused `value`."""
        kind, shown = error["type"], list(value) if isinstance(value, tuple) else value
        if kind == "missing" and len(error["loc"]) == 1:
            return f"{self.key} is not set: give {self.key}=..."
        if kind == "value_error":
            return f"{self.key}={shown!r}: {error['ctx']['error']}"
        length = self.schema.get("minItems")
        if self.is_list and length and isinstance(value, tuple) and len(value) != length:
            return f"{self.key}={shown!r}: expected {length} values, got {len(value)}"
        fits = not kind.endswith("_type")
        hint = nearest(str(value), map(str, self.schema["enum"])) if "enum" in self.schema else ""
        return f"{self.key}={shown!r}: expected {self._expected(fits)}{'.' if hint else ''}{hint}"

    def _expected(self, fits: bool = False) -> str:
        """Return what is allowed, in words; the bounds alone for a value whose type `fits`."""
        if "enum" in self.schema:
            words = "one of " + ", ".join(map(str, self.schema["enum"]))
        else:
            bounds = _bounds(self.item)
            kind = f"a list of {MANY[self.item['type']]}" if self.is_list else ONE[self.item["type"]]
            words = (bounds or "a finite number") if fits else ", ".join(filter(None, (kind, bounds)))
            if self.is_list and not fits:
                words += f", such as {'[a, b]' if self.item['type'] == 'string' else self.default or [8, 7, 7]}"
        return f"{words}, or null" if self.optional else words


def group_name(group: type) -> str:
    """Name a group as the keys of its settings do: `data` for DataSettings."""
    return group.__name__.removesuffix("Settings").lower()


@cache
def rules_of(group: type[Any]) -> Mapping[str, Rule]:
    """Return the rule of each field of a group of settings."""
    hints = typing.get_type_hints(group, include_extras=True)
    whole = TypeAdapter(group).json_schema()
    return {
        field: Rule(
            f"{group_name(group)}.{field}",
            schema,
            required=field in whole.get("required", ()),
            may_differ=MUTABLE in getattr(hints[field], "__metadata__", ()),
        )
        for field, schema in whole["properties"].items()
    }


def _given(group: Any, values: Any) -> dict[str, Any]:
    """Return the values that a group's constructor was called with, by the names of the fields."""
    if not isinstance(values, ArgsKwargs):
        return dict(values)
    names = (f.name for f in dataclasses.fields(group))
    return {**dict(zip(names, values.args, strict=False)), **(values.kwargs or {})}


def _bounds(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if least is not None:
        if most is not None:
            return f"from {least} to {most}"
        return f"{least} or more" if below is None else f"from {least} up to, not including, {below}"
    if above is not None:
        return f"more than {above}" if most is None else f"more than {above}, up to {most}"
    return ""


def _items(text: str) -> list[str] | None:
    """Return the items of `[a, "b, c"]`: literal texts, in quotes where they hold commas; None where it is not a list."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]") and len(text) > 1):
        return None
    found = [m.groups() for m in ITEM.finditer(text[1:-1])][:-1]  # the last is what stands behind the last item: nothing
    return [_item(*groups) for groups in found]


def _item(double: str | None, single: str | None, bare: str | None) -> str:
    if double is not None:
        return double.replace('""', '"')
    return single.replace("''", "'") if single is not None else bare or ""
