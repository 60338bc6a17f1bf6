"""The ways of scoring views are timed on the same views; what they take is not asserted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vswin_dist.benchmarks import views


@pytest.mark.slow
def test_each_way_has_a_rate(motion_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--clips", "2", "--crops", "3", "--videos", "2", "--turns", "1", "--frames", "4")
    assert views.main([f"{motion_shards}/val", *options]) == 0
    said = capsys.readouterr().out
    assert "swin_nano, 2 videos, 2 x 3 views, cpu" in said
    assert (
        len(re.findall(r"^(?:all|decoded|one) .* [\d.]+ views/s \([\d.]+ to [\d.]+\), [\d.]+ x$", said, re.MULTILINE)) == 3
    )
