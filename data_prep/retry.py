"""`data-prep retry`: process the rejected videos of a dataset once more; what is good now follows in new shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data_prep import journal
from data_prep.encode import Outcome
from data_prep.pack import Entry, cut_into_shards, notes_of, shard_name, write_shard
from data_prep.progress import say
from data_prep.reprocess import Finished, open_finished, reprocess
from vswin_dist.columns import Builder, Table
from vswin_dist.lease import Fence
from vswin_dist.manifest import Manifest, Reject, Sample, Shard, write_manifest


def retry(url: str, workers: int | None = None, show_progress: bool = True) -> Manifest:
    """Process the rejected videos once more; those that are good now follow in shards of their own.

    Raises:
        DataError: the dataset has no journal, or another run works on it.
        WorkFailed: the work stopped; calling again resumes it.
    """
    dataset = open_finished(url, workers, show_progress)
    with journal.only_writer(dataset.url) as fence:
        return _retry(dataset, fence)


def _retry(dataset: Finished, fence: Fence) -> Manifest:
    old = dataset.manifest
    failed = np.array([reason != "duplicate" for reason in old.rejected.column("reason").tolist()], dtype=bool)
    ids = set(old.rejected[np.flatnonzero(failed)].column("source_id").tolist())
    if not ids:
        return old
    staging = dataset.staging("retry")
    entries = reprocess(dataset, ids, staging)
    if not dataset.settings.keep_duplicates:
        crc32s, sizes, names = (old.samples.column(name).tolist() for name in ("crc32", "size", "source_id"))
        seen = dict(zip(zip(crc32s, sizes, strict=True), names, strict=True))
        entries = [_without_twins(entry, seen) for entry in entries]
    shards, samples = list(old.shards), Builder(Sample)
    for block in old.samples.blocks():
        samples.add(block)
    for group in cut_into_shards([e for e in entries if e.outcome.kept], dataset.settings):
        number = len(shards)
        shard, more = write_shard(group, number, dataset.url, journal.Staging(staging), shard_name(number))
        if dataset.show_progress:
            say(notes_of(group))
        shards.append(shard)
        samples.extend(more)
    rejected = [*old.rejected[np.flatnonzero(~failed)], *(e.reject() for e in entries if not e.outcome.kept)]
    manifest = replace(old, shards=Table.of(Shard, shards), samples=samples.table(), rejected=Table.of(Reject, rejected))
    fence.check()
    write_manifest(manifest, dataset.url)
    journal.Staging(staging).clear()
    return manifest


def _without_twins(entry: Entry, seen: dict[tuple[int, int], str]) -> Entry:
    """Mark the same encoded bytes under another name as a duplicate; `seen` holds what is kept already."""
    if not entry.outcome.kept:
        return entry
    first = seen.setdefault((entry.outcome.crc32, entry.outcome.size), entry.item.source_id)
    if first == entry.item.source_id:
        return entry
    return replace(entry, outcome=Outcome("duplicate", f"the same bytes as {first}", entry.outcome.content))
