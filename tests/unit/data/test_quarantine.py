"""The ledger of corrupt samples: what it keeps, what it counts once, and when it stops a training run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vswin_dist.data.plan import Plan
from vswin_dist.data.quarantine import ALWAYS_ALLOWED, CorruptSample, Ledger
from vswin_dist.errors import DataError
from vswin_dist.manifest import Manifest, read_manifest


@pytest.fixture
def manifest(motion_shards: Path) -> Manifest:
    return read_manifest(str(motion_shards / "train"))


def corrupt(sample: int, step: int, position: int = 0) -> CorruptSample:
    return CorruptSample(step, position, 0, sample, f"video {sample} is corrupt", 50)


def test_a_resumed_run_keeps_the_count_and_counts_no_step_twice(tmp_path: Path, manifest: Manifest) -> None:
    ledger = Ledger(str(tmp_path), manifest, "shards")
    ledger.load()
    ledger.add([corrupt(3, step=2), corrupt(4, step=1), corrupt(3, step=2, position=9)])
    ledger.add([corrupt(3, step=5)])
    ledger.write()
    assert ledger.metrics == {"data/bad_videos": 2, "data/substitutes": 4}
    resumed = Ledger(str(tmp_path), manifest, "shards")
    resumed.load()
    resumed.add([corrupt(3, step=5), corrupt(4, step=6)])  # step 5 is repeated
    assert resumed.metrics == {"data/bad_videos": 2, "data/substitutes": 5}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [manifest.samples[4].key, manifest.samples[3].key]
    assert lines[1]["reason"] == "video 3 is corrupt" and lines[1]["shard"].endswith(manifest.shards[0].url)
    assert (lines[1]["step"], lines[1]["times"], lines[1]["substitute"]) == (2, 3, manifest.samples[50].key)


def test_the_budget_is_a_fraction_of_what_was_read(tmp_path: Path, manifest: Manifest) -> None:
    ledger = Ledger(str(tmp_path), manifest, "shards")
    ledger.check(Plan("f", 100_000, 0, 100), 0, 0.01)
    ledger.add(corrupt(i, step=0, position=i) for i in range(ALWAYS_ALLOWED))
    plan = Plan("f", 100_000, 0, 100)
    ledger.check(plan, 1, 0.01)
    ledger.add([corrupt(20, step=5)])
    ledger.check(plan, 10, 0.01)
    with pytest.raises(DataError) as error:
        ledger.check(plan, 1, 0.01)  # six steps are known to have been done
    assert str(error.value) == (
        f"9 of the first 600 videos do not decode, more than data.max_bad_samples=0.01 allows (8 always are). "
        f"{tmp_path}/quarantine.jsonl names them; the last is {manifest.samples[20].key!r}: video 20 is corrupt"
    )
    with pytest.raises(DataError, match="9 of the first 100 videos"):
        ledger.check(Plan("f", 100, 0, 10), 10_000, 0.01)


def test_videos_that_occur_repeatedly_count_once(tmp_path: Path, manifest: Manifest) -> None:
    """Balanced classes: 10 of 1,000 samples fill half of every epoch."""
    labels = np.array([0] * 990 + [1] * 10)
    plan = Plan("f", 1000, 0, 100, balanced=labels)
    ledger = Ledger(str(tmp_path), manifest, "shards")
    ledger.add(corrupt(i, step=0, position=i) for i in range(9))
    drawn = len(set(plan.order(0)[:900].tolist()))
    assert drawn <= 460
    with pytest.raises(DataError, match=f"9 of the first {drawn} videos"):
        ledger.check(plan, 9, 0.01)
    ledger.check(plan, 9, 0.02)
    ledger.check(plan, 40, 0.01)


def test_a_file_that_is_not_a_ledger_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "quarantine.jsonl").write_text("what?")
    with pytest.raises(
        DataError, match=r"quarantine\.jsonl, line 1, is not a valid entry of the ledger of corrupt samples: it is not JSON"
    ):
        Ledger(str(tmp_path), manifest, "shards").load()
