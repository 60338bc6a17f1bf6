"""The rendered videos of the demonstration."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.local import motions


@pytest.mark.slow
def test_more_processes_render_the_same_files(tmp_path: Path) -> None:
    one, two = (motions.make_dataset(tmp_path / str(n), 12, seed=3, processes=n) for n in (1, 2))
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(files) == 13 and files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
