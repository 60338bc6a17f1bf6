"""Waiting for what other processes and threads do, however slow the machine is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None,
               timeout_s: float = 120) -> None:
    """Return as soon as `condition` holds; fail where it does not come to that, or `process` ends before."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"it never came to that in {timeout_s:g} s"
        if process is not None and process.poll() is not None:
            output, errors = process.communicate()
            raise AssertionError(f"it ended with {process.returncode}:\n{(output or '')[-5000:]}\n{(errors or '')[-5000:]}")
        time.sleep(0.005)
