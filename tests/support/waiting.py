"""Waiting for what other processes and threads do, however slow the machine is."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

SERVER_TIMEOUT_S = 300.0  # for a machine that other work has filled
STARTS = 3  # of a server whose port is taken, which somebody can do between the look for a free one and the start


def start_server(
    launch: Callable[[], subprocess.Popen[bytes]], answers: Callable[[], bool], stop: Callable[[], None], log: Path
) -> None:
    """Launch a server and wait until it answers; launch it anew where it ended before, and another answers at its port.

    Raises:
        RuntimeError: it ended each time, or does not answer; the message holds the end of its `log`.
    """
    for _ in range(STARTS):
        process, end = launch(), time.monotonic() + SERVER_TIMEOUT_S
        while process.poll() is None and time.monotonic() < end:
            if answers() and process.poll() is None:
                return
            time.sleep(0.05)
        hangs = process.poll() is None
        stop()
        if hangs:
            break
    raise RuntimeError(f"the server did not start; its log ends:\n{log.read_text(errors='replace')[-3000:]}")


def answers(url: str) -> bool:
    """Whether anything answers at `url`, be it that it refuses for want of keys."""
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def below(folder: Path, pattern: str) -> list[Path]:
    """Files and folders below `folder` whose names match `pattern`, while others add and remove some.

    `Path.glob` fails where a folder is removed between its parent's listing and its own.
    """
    return [
        Path(root, name) for root, folders, files in os.walk(folder) for name in fnmatch.filter([*folders, *files], pattern)
    ]


class Job(subprocess.Popen[str]):
    """A process whose output goes to a file, or else to pipes."""

    file: Path | None = None


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, timeout_s: float = 300
) -> None:
    """Return as soon as `condition` holds; fail where it does not come to that, or `process` ends before."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"it never came to that in {timeout_s:g} s"
        if process is not None and process.poll() is not None:
            output, errors = process.communicate()
            if isinstance(process, Job) and process.file:
                output = process.file.read_text()
            raise AssertionError(f"it ended with {process.returncode}:\n{(output or '')[-5000:]}\n{(errors or '')[-5000:]}")
        time.sleep(0.05)
