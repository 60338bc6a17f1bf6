"""`python jobs/benchmark.py`: its help, that of each benchmark, and names that it does not know."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from vswin_dist.errors import ConfigError

JOB = Path(__file__).parents[3] / "jobs" / "benchmark.py"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", [str(JOB), *arguments])
    return runpy.run_path(str(JOB))["main"]()


def test_help_names_every_benchmark_on_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--help")
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    for name in ("model", "prep", "loader"):
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3


@pytest.mark.parametrize(
    ("name", "option"), [("model", "--also"), ("prep", "SOURCE"), ("checkpoint", "--train"), ("loader", "--pixel-format")]
)
def test_each_benchmark_has_its_own_help(
    name: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, name, "--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and option in shown
    assert shown.startswith(f"usage: benchmark.py {name}")


def test_an_unknown_name_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'modle' is not a benchmark\. Did you mean 'model'\? There are model, prep, "):
        run(monkeypatch, "modle", "--help")
