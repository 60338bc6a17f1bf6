"""A job's process, forked from one that has imported what jobs import: eight seconds of computing saved for each.

It has its own arguments, environment, working folder, session and output, and ends as a script does. What starts before its
imports count, a signal or a kill, is tried on `Line.start`, which runs Python anew.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run_script(
    script: Path, args: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path, timeout_s: float
) -> int:
    """Run `script` in `folder` to its end, its output in the file `output`; the exit code.

    Raises:
        TimeoutError: it takes longer than `timeout_s`; it is killed.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.rank_imports"])  # the one server of this process, which ranks have too
    process = context.Process(target=_enter, args=(str(script), [*args], str(folder), dict(environment), str(output)))
    process.start()
    try:
        process.join(timeout_s)
        if process.exitcode is None:
            raise TimeoutError(f"{script} takes longer than {timeout_s:g} s:\n{output.read_text()[-6000:]}")
        return int(process.exitcode)
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def _enter(script: str, args: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
