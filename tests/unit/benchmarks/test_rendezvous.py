"""`jobs/benchmark.py rendezvous`, on as few ranks as make a difference."""

from __future__ import annotations

from typing import Any

import pytest

from vswin_dist.benchmarks import rendezvous

pytestmark = pytest.mark.slow


def test_all_ranks_meet(capsys: pytest.CaptureFixture[str]) -> None:
    rendezvous.main(["--ranks", "5", "--processes", "2"])
    row = capsys.readouterr().out.splitlines()[-1]
    ranks, connected, given = (float(cell) for cell in row.strip("| ").split("|"))
    assert ranks == 5 and 0 <= connected <= given < 60


def fall(port: int, ranks: int, line: Any) -> None:
    """Be a process that ends at its start."""
    raise SystemExit(3)


def leave(port: int, ranks: int, line: Any) -> None:
    """Be a process that ends once it is connected, before its ranks are counted."""
    line.send(0.0)
    line.recv()
    line.send(0.0)


@pytest.mark.parametrize("ends", [fall, leave])
def test_a_process_that_ends_is_an_error(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "take_part", ends)
    with pytest.raises(RuntimeError, match="has ended"):
        rendezvous.meet(5, 2)
