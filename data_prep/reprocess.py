"""Process chosen videos of a finished dataset once more: what `retry` and `repair` are made of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from data_prep import journal, sources
from data_prep.archive import members
from data_prep.encode import Outcome
from data_prep.executor import LocalExecutor, Task
from data_prep.order import order_key
from data_prep.pack import Entry
from data_prep.pipeline import MISSING
from data_prep.progress import Progress
from data_prep.settings import PrepSettings, settings_of
from data_prep.tasks import RESUME, SampleTask, process_sample
from vswin_dist import storage
from vswin_dist.errors import DataError, after_start, before_start
from vswin_dist.manifest import Manifest, manifest_url, nfc, read_manifest


@dataclass
class Finished:
    """A dataset that stands, with what its journal says about where it came from."""

    url: str
    manifest: Manifest
    source: sources.Source
    settings: PrepSettings
    workers: int
    show_progress: bool

    def staging(self, purpose: str) -> str:
        """Name the folder where its videos wait, apart for every state of the dataset: an interrupted call resumes."""
        return storage.join(journal.folder(self.url), f"{purpose}-{self.manifest.fingerprint[:12]}")


def open_finished(url: str, workers: int | None = None, show_progress: bool = True) -> Finished:
    """Read the manifest and the journal of the dataset at `url` (its folder or the manifest's file).

    Raises:
        DataError: one of them is absent, or the encoder is not the one of then.
        PreflightError: the storage fails.
    """
    folder = manifest_url(storage.absolute(url)).rpartition("/")[0]
    with before_start():
        manifest = read_manifest(url)
        specification = journal.read_specification(folder)
    if specification is None:
        raise DataError(f"{url} has no journal (.data-prep): it does not say where its videos came from")
    settings = settings_of(specification["settings"])
    if settings.encoding.record() != manifest.encoding:
        raise DataError(
            f"{url} was encoded as {manifest.encoding}, this installation would make {settings.encoding.record()}"
        )
    return Finished(
        folder,
        manifest,
        sources.build(specification["source"]),
        settings,
        workers or os.cpu_count() or 1,
        show_progress,
    )


def reprocess(dataset: Finished, ids: set[str], staging: str) -> list[Entry]:
    """Process the videos of these source ids; their bytes are staged, or stay where they are.

    Returns:
        Their entries in the dataset's order, numbered from 0.

    Raises:
        DataError: the source does not name them any more. PreflightError: it cannot be read now.
        WorkFailed: the work stopped.
    """
    with before_start():
        listing = dataset.source.listing()
    spelled = {nfc(i): i for i in ids}  # the source may write the same letters in another way now
    found = (replace(i, source_id=spelled[form]) for i in listing.items if (form := nfc(i.source_id)) in spelled)
    chosen = sorted(found, key=lambda i: order_key(dataset.settings.seed, i.source_id))
    if gone := ids.difference(i.source_id for i in chosen):
        raise DataError(f"the source does not name {len(gone)} of the videos any more, for instance {min(gone)!r}")
    outcomes = {index: o for index, o in journal.Staging(staging).outcomes().items() if o.kept}
    process = partial(process_sample, dataset.settings.encoding, staging)
    tasks = (
        Task(video.index, process, video)
        for video in _videos(listing, chosen, set(outcomes))
        if video.item.url or video.data is not None
    )
    progress = Progress(len(chosen), "videos", len(outcomes), dataset.show_progress)
    with after_start(RESUME), LocalExecutor(dataset.workers) as pool:
        for done in pool.run(tasks):
            outcomes[done.ticket] = Outcome("crashed", done.crashed) if done.crashed else done.value
            progress.advance()
    progress.close()
    ids_of = sources.class_ids(dataset.manifest.classes)
    as_is = not dataset.settings.encoding.transcodes
    entries = []
    for index, item in enumerate(chosen):
        class_id = ids_of[nfc(item.class_name)]
        item = replace(item, class_name=dataset.manifest.classes[class_id])
        entries.append(Entry(index, index, item, class_id, outcomes.get(index, MISSING), as_is))
    return entries


def _videos(listing: sources.Listing, chosen: list[sources.Item], done: set[int]) -> Iterator[SampleTask]:
    """Yield the `chosen` videos that are not `done`; those in archives with their bytes, where these hold them."""
    missing = {nfc(item.source_id): index for index, item in enumerate(chosen) if index not in done}
    if not listing.archives:
        yield from (SampleTask(index, chosen[index]) for index in missing.values())
        return
    for urls in listing.archives:
        if not missing:
            return
        label = urls[0].rsplit("/", 1)[-1]

        def wanted(name: str, label: str = label) -> list[sources.Item]:
            return [item for item in listing.find(f"{label}/{name}") if nfc(item.source_id) in missing]

        for member in members(urls, lambda name: bool(wanted(name))):
            for item in [] if member.refusal else wanted(member.name):
                index = missing.pop(nfc(item.source_id))
                yield SampleTask(index, replace(chosen[index], stretch=item.stretch), member.data)
