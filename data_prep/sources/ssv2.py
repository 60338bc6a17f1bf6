"""Something-Something V2: annotation json, labels.json, and `ID.webm` in a folder or in the cut tar.gz.

The class is the entry's template without its brackets; class ids come from labels.json. Test entries have an id
alone: their classes come from the answers csv (`id;class name`).
"""

from __future__ import annotations

import argparse
import json
import re
from array import array
from dataclasses import dataclass
from typing import Any, ClassVar

from data_prep.compact import Chosen
from data_prep.sources.base import (
    Listing,
    check_present,
    find_archives,
    find_files,
    first_per_id,
    is_no_video,
    natural,
    read_text,
)
from data_prep.sources.items import Item
from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.manifest import nfc

_PIECE = re.compile(r"-(\d\d+|[a-z]{2})$")  # 20bn-something-something-v2-00, ...-aa


@dataclass(frozen=True)
class Ssv2Source:
    """Entries of an SSv2 json file. Fields are plain values; `answers` is "" where the entries have templates."""

    annotations: str
    labels: str
    videos: str
    answers: str
    kind: ClassVar[str] = "ssv2"

    def listing(self) -> Listing:
        """See `Source.listing`."""
        classes = self._classes()
        items, numbers, notes = first_per_id(self._rows(), self.annotations)

        def number_of(path: str) -> int:
            return -1 if is_no_video(path) else numbers.find(nfc(path.rsplit("/", 1)[-1].rsplit(".", 1)[0]))

        def find(path: str) -> list[Item]:
            number = number_of(path)
            return [items[number]] if number >= 0 else []

        if archives := self._archives():
            return Listing(items, [], classes, archives, find, notes)
        files = find_files(self.videos)
        items.locate(storage.absolute(self.videos), files)
        unlabelled = array("i")
        for file, path in enumerate(files):
            number = number_of(path)
            if number >= 0 and items.file(number) < 0:
                items.place(number, file, False)
            else:
                unlabelled.append(file)
        check_present(items, self.annotations, self.videos)
        return Listing(items, Chosen(files, unlabelled), classes, notes=notes)

    def _archives(self) -> list[list[str]]:
        if found := find_archives(self.videos) if not _PIECE.search(self.videos.rstrip("*?")) else []:
            return [[url] for url in found] if not _PIECE.search(found[0]) else [found]
        names = storage.list_names(storage.absolute(self.videos))
        pieces = sorted((n for n in names if _PIECE.search(n)), key=natural)
        return [[storage.join(storage.absolute(self.videos), n) for n in pieces]] if pieces else []

    def _json(self, url: str, what: str) -> Any:
        try:
            return json.loads(read_text(url, what))
        except ValueError as error:
            raise DataError(f"{what} {url} is not valid JSON: {error}") from error

    def _classes(self) -> list[str]:
        labels = self._json(self.labels, "labels")
        try:
            ids = {int(number): str(name) for name, number in labels.items()}
            return [ids[i] for i in range(len(labels))]
        except (AttributeError, ValueError, KeyError) as error:
            raise DataError(f"{self.labels} does not map class names to the ids 0, 1, 2, ...") from error

    def _rows(self) -> list[Item]:
        entries = self._json(self.annotations, "annotations")
        answers: dict[str, str] = {}
        if self.answers:
            pairs = (line.partition(";") for line in read_text(self.answers, "answers").splitlines() if line.strip())
            answers = {number.strip(): name.strip() for number, _, name in pairs}
        rows = []
        try:
            for entry in entries:
                number = str(entry["id"])
                template = entry.get("template")
                name = re.sub(r"[\[\]]", "", template) if template else answers.get(number, "")
                if not name:
                    raise DataError(
                        f"{self.annotations}: entry {number} has no template"
                        + (f" and no line in {self.answers}" if self.answers else "; give --answers")
                    )
                rows.append(Item(number, name, ""))
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{self.annotations} is not a list of entries with an id") from error
        if not rows:
            raise DataError(f"{self.annotations} has no entries")
        return rows

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """See `Source.add_arguments`."""
        parser.set_defaults(sampling="uniform")  # actions are defined over the whole video
        parser.add_argument("--annotations", required=True, metavar="URL", help="train, validation or test json")
        parser.add_argument("--labels", required=True, metavar="URL", help="labels.json")
        parser.add_argument(
            "--videos",
            required=True,
            metavar="URL",
            help="folder of ID.webm files, or of the pieces 20bn-something-something-v2-??",
        )
        parser.add_argument("--answers", default="", metavar="URL", help="csv of the test set's classes, id;class name")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Ssv2Source:
        """See `Source.from_arguments`."""
        answers = storage.absolute(arguments.answers) if arguments.answers else ""
        return cls(
            storage.absolute(arguments.annotations),
            storage.absolute(arguments.labels),
            storage.absolute(arguments.videos),
            answers,
        )
