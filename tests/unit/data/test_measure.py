"""The figures of feeding can be taken; what they are is not asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from vswin_dist.config import load_settings
from vswin_dist.data.measure import clips_per_second, first_batch, memory_slope, plan_cost


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
