"""A driver's answer to signals: a file beside the checkpoints, and the end of its work later or at the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

DRIVER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for what it starts in the background
from vswin_dist.training.stop_request import StopRequest

request = StopRequest(sys.argv[1], "now")
try:
    with request.made_by_signals(float(sys.argv[2])) as stopped:
        print("ready", flush=True)
        while not (sys.argv[3] == "obeys" and stopped.is_set() and request.exists()):
            time.sleep(0.01)
    print("left")
except KeyboardInterrupt:
    print("interrupted")
"""


def driver(folder: Path, grace_s: float, kind: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), str(grace_s), kind], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_the_file_is_gone_afterwards(tmp_path: Path, number: signal.Signals) -> None:
    process = driver(tmp_path, 60, "obeys")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert output.endswith("left\n") and "within 60 s" in output
    assert not list(tmp_path.iterdir())


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    process = driver(tmp_path, 60, "hangs")
    process.send_signal(signal.SIGTERM)
    wait_until((tmp_path / "stop-now").exists, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.endswith("interrupted\n") and time.monotonic() - began < 30
    assert not list(tmp_path.iterdir())


def test_the_end_of_the_grace_time_stops(tmp_path: Path) -> None:
    process = driver(tmp_path, 0.2, "hangs")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.endswith("interrupted\n")
