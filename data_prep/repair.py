"""`data-prep verify --repair`: rebuild missing and damaged shards from the source, to the bytes of the manifest."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from data_prep import journal
from data_prep.pack import write_shard
from data_prep.reprocess import Finished, open_finished, reprocess
from data_prep.verify import verify_dataset
from vswin_dist.errors import WorkFailed
from vswin_dist.manifest import Sample


def repair(url: str, workers: int | None = None, show_progress: bool = True) -> tuple[list[str], dict[int, list[str]]]:
    """Rebuild missing or damaged shards, and only these, from the source.

    Returns:
        The names of what was rebuilt, and what was wrong before. A rebuilt shard has the bytes of the manifest.

    Raises:
        DataError: the dataset has no journal, or another run works on it.
        WorkFailed: a video is not what it was, so that its shard cannot be rebuilt.
    """
    wrong = verify_dataset(url, workers, show_progress)
    numbers = [n for n in wrong if n >= 0]
    if not numbers:
        return [], wrong
    dataset = open_finished(url, workers, show_progress)
    with journal.only_writer(dataset.url):
        return _rebuild(dataset, numbers), wrong


def _rebuild(dataset: Finished, numbers: list[int]) -> list[str]:
    manifest = dataset.manifest
    wanted: dict[int, list[Sample]] = defaultdict(list)
    for sample in manifest.samples[np.flatnonzero(np.isin(manifest.samples.numbers("shard"), numbers))]:
        wanted[sample.shard].append(sample)
    staging = dataset.staging("repair")
    ids = {s.source_id for n in numbers for s in wanted[n]}
    entries = {e.item.source_id: e for e in reprocess(dataset, ids, staging)}
    for number in numbers:
        shard = manifest.shards[number]
        group = [entries[s.source_id] for s in wanted[number]]
        for entry, sample in zip(group, wanted[number], strict=True):
            if (entry.outcome.size, entry.outcome.crc32) != (sample.size, sample.crc32):
                raise WorkFailed(
                    f"{shard.url} cannot be rebuilt: {sample.source_id} is now "
                    f"{entry.outcome.verdict} with other bytes than when it was sharded"
                )
        write_shard(group, number, dataset.url, journal.Staging(staging), shard.url, shard.sha256)
    journal.Staging(staging).clear()
    return [manifest.shards[n].url for n in numbers]
