"""What a process finds on its machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import multiprocessing, sys, tempfile
from vswin_dist.device import place_sockets
if __name__ == "__main__":
    place_sockets()
    process = multiprocessing.get_context("forkserver").Process(target=print, args=("started",))
    process.start()
    process.join()
    print(tempfile.gettempdir())
"""


@pytest.mark.slow
@pytest.mark.parametrize("length", [60, 71, 200])
def test_processes_start_however_long_the_path_of_temporary_files_is(length: int) -> None:
    folder = Path(os.environ["TMPDIR"])
    folder /= "x" * (length - len(str(folder)) - 1)
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["started", str(folder)], done.stderr
    assert not list(folder.iterdir())
