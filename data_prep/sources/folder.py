"""One folder per class: `DIR/CLASS/.../VIDEO`. The class is the first folder's name."""

from __future__ import annotations

import argparse
from array import array
from dataclasses import dataclass
from typing import ClassVar

from data_prep.compact import Chosen
from data_prep.sources.base import Listing, find_files
from data_prep.sources.items import Items
from vswin_dist import storage
from vswin_dist.errors import DataError


@dataclass(frozen=True)
class FolderSource:
    """Videos below one folder per class; a file that lies beside the class folders has no class and is unlabelled."""

    videos: str
    kind: ClassVar[str] = "folder"

    def listing(self) -> Listing:
        """See `Source.listing`."""
        files = find_files(self.videos)
        items, unlabelled = Items(storage.absolute(self.videos), files), array("i")
        for number, file in enumerate(files):
            if "/" in file:
                items.append(file, file.split("/", 1)[0], number)
            else:
                unlabelled.append(number)
        if not items:
            raise DataError(
                f"{self.videos} has no class folders, only {len(files)} files such as {files[0]!r}; "
                "use data-prep shard csv with an index"
            )
        return Listing(items, Chosen(files, unlabelled))

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """See `Source.add_arguments`."""
        parser.add_argument("--videos", required=True, metavar="URL", help="folder with one folder per class")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> FolderSource:
        """See `Source.from_arguments`."""
        return cls(storage.absolute(arguments.videos))
