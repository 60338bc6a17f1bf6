"""The metrics of feeding can be measured; what they are is not asserted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vswin_dist.benchmarks import loader
from vswin_dist.benchmarks.feeding import clips_per_second, cold_passes, first_batch, memory_slope, plan_cost
from vswin_dist.config import load_settings
from vswin_dist.errors import DataError


def test_the_plan_is_priced() -> None:
    cost = plan_cost(5000, 64)
    assert cost.rank_mb > 0 and cost.all_ranks_mb > 0
    assert "for one rank at any step" in str(cost)


@pytest.mark.slow
def test_rates_first_batches_and_memory(motion_shards: Path) -> None:
    data = load_settings("demo", [f"data.train={motion_shards}/train", "data.workers=1"]).data
    assert len(clips_per_second(data, 13, epochs=2)) == 2
    assert first_batch(data, 13, step=1000) > 0
    slope = memory_slope(data, 13, epochs=5)
    assert len(slope.held_mb) == 5 and "MB an epoch after the third" in str(slope)


@pytest.mark.slow
def test_copies_of_different_sets_are_not_compared(motion_shards: Path) -> None:
    data = load_settings("demo", [f"data.train={motion_shards}/train"]).data
    with pytest.raises(DataError, match="compare copies of the same one"):
        cold_passes(data, f"{motion_shards}/val", 13, 1)


@pytest.mark.slow
def test_first_passes_are_compared(motion_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(motion_shards / "train", tmp_path / "there")
    assert (
        loader.main(
            [
                f"{motion_shards}/train",
                "--against",
                f"{tmp_path}/there",
                "--workers",
                "1",
                "--repeats",
                "2",
                "--frames",
                "8",
                "--size",
                "32",
                "--batch",
                "13",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["here"]) == len(found["there"]) == len(found["copied"]) == 2
    assert found["ratio"] > 0 and found["copied_ratio"] > 0
