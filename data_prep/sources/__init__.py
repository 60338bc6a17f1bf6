"""The kinds of sources. A new kind is one file with a class like `FolderSource`, and its line in `KINDS`."""

from __future__ import annotations

from typing import Any

from data_prep.sources.base import (
    Listing,
    Source,
    check_url,
    class_ids,
    class_list,
    note_of_empty,
    read_classes,
    some,
    spec,
)
from data_prep.sources.csv_index import CsvSource
from data_prep.sources.folder import FolderSource
from data_prep.sources.items import Item, Items
from data_prep.sources.kinetics import KineticsSource
from data_prep.sources.path_list import ListSource
from data_prep.sources.ssv2 import Ssv2Source

__all__ = [
    "KINDS",
    "Item",
    "Items",
    "Listing",
    "Source",
    "build",
    "check_url",
    "class_ids",
    "class_list",
    "note_of_empty",
    "read_classes",
    "some",
    "spec",
]

KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in (FolderSource, CsvSource, ListSource, KineticsSource, Ssv2Source)}


def build(description: dict[str, Any]) -> Source:
    """Make the source that `spec` described."""
    fields = dict(description)
    source: Source = KINDS[fields.pop("kind")](**fields)
    return source
