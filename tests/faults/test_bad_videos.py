"""Bad videos are replaced and named beside the checkpoints; too many stop the training until more are allowed."""

from __future__ import annotations

import json

from tests.support.line import Line
from tests.support.shards import with_bad_videos
from vswin_dist.manifest import read_manifest


def test_a_training_stops_beyond_its_budget_and_goes_on_within_a_larger_one(line: Line) -> None:
    with_bad_videos(line.shards / "train", line.home / "train", range(0, 52, 5))  # 11 of 52
    url = f"data.train={line.home}/train"
    output = line.train("bad", url, "data.max_bad_samples=0.0", code=1)
    assert "videos do not decode, more than data.max_bad_samples=0 allows (8 always are)" in output
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: ") and "videos do not decode" in last and "a worker failed" not in last
    [ledger] = (line.home / "runs" / "bad").glob("*/quarantine.jsonl")
    first = [json.loads(text) for text in ledger.read_text().splitlines()]
    assert len(first) > 8

    output = line.train("bad", url, "data.max_bad_samples=0.5")
    assert "6/6" in output and sorted(line.losses("bad")) == list(range(1, 7))
    entries = [json.loads(text) for text in ledger.read_text().splitlines()]
    assert [e["key"] for e in entries[:len(first)]] == [e["key"] for e in first]
    bad = {read_manifest(str(line.home / "train")).samples[i].key for i in range(0, 52, 5)}
    assert {e["key"] for e in entries} <= bad and all("cannot be decoded" in e["reason"] for e in entries)
    assert not {e["substitute"] for e in entries} & bad
    from mlflow import MlflowClient

    client = MlflowClient(line.uri)
    run = client.get_run(ledger.parent.name)
    assert run.data.metrics["data/bad_videos"] == len(entries)
    assert run.data.metrics["data/substitutes"] == sum(e["times"] for e in entries)
