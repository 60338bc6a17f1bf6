"""The rendered videos of the demonstration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from infra.local import motions


@pytest.mark.slow
def test_more_processes_render_the_same_files(tmp_path: Path) -> None:
    one, two = (motions.make_dataset(tmp_path / str(n), 12, seed=3, processes=n) for n in (1, 2))
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(files) == 13 and files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


@pytest.mark.parametrize(("one", "other"), [("left", "right"), ("up", "down"), ("clockwise", "counter-clockwise")])
def test_a_motion_is_another_one_played_backwards(one: str, other: str) -> None:
    """So frames without order do not tell the two apart."""
    for seed in range(20):
        forwards, backwards = (motions.path_of(m, np.random.default_rng(seed)) for m in (one, other))
        half = motions.SIZE / 2
        moved, back = ((np.diff(path, axis=0) + half) % motions.SIZE - half for path in (forwards, backwards[::-1]))
        np.testing.assert_allclose(moved, back, atol=1e-9)
