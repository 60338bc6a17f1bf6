"""Corrupt videos are replaced and named beside the checkpoints; too many stop the training run until more are allowed."""

from __future__ import annotations

import json

import pytest

from tests.support import trainers
from tests.support.line import Line
from tests.support.shards import with_corrupt_videos
from vswin_dist.manifest import read_manifest


def test_a_run_stops_beyond_its_budget_and_resumes_within_a_larger_one(line: Line) -> None:
    with_corrupt_videos(line.shards / "train", line.home / "train", range(0, 52, 5))  # 11 of 52
    url = f"data.train={line.home}/train"
    allowed = r"videos do not decode, more than data.max_bad_samples=0 allows \(8 always are\)"
    with pytest.raises(AssertionError, match=rf"DataError: .*{allowed}"):
        trainers.train(line, "bad", url, "data.max_bad_samples=0.0")
    [ledger] = (line.home / "runs" / "bad").glob("*/quarantine.jsonl")
    first = [json.loads(text) for text in ledger.read_text().splitlines()]
    assert len(first) > 8

    folder = trainers.train(line, "bad", url, "data.max_bad_samples=0.5")
    assert sorted(trainers.losses(folder)) == list(range(1, 7))
    entries = [json.loads(text) for text in ledger.read_text().splitlines()]
    assert [e["key"] for e in entries[: len(first)]] == [e["key"] for e in first]
    corrupt = {read_manifest(str(line.home / "train")).samples[i].key for i in range(0, 52, 5)}
    assert {e["key"] for e in entries} <= corrupt and all("cannot be decoded" in e["reason"] for e in entries)
    assert not {e["substitute"] for e in entries} & corrupt
    last = [m for m in trainers.metrics(folder) if "data/bad_videos" in m][-1]
    assert last["data/bad_videos"] == len(entries)
    assert last["data/substitutes"] == sum(e["times"] for e in entries)
