"""`jobs/benchmark.py planning` as it is given, from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parents[3] / "jobs" / "benchmark.py"


@pytest.mark.slow
def test_a_benchmark_finds_what_it_takes_from_the_tests(tmp_path: Path) -> None:
    command = [sys.executable, str(JOB), "planning", "--rows", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("| model | clip |"), done.stderr
