"""What is forked instead of started behaves as what is started."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support import warm
from tests.support.waiting import wait_until

SCRIPT = """
import multiprocessing, os, sys, time
print(sys.argv[1:], os.getcwd(), os.environ.get("ONLY"), "PATH" in os.environ, "torch" in sys.modules, flush=True)
print(multiprocessing.parent_process(), os.getsid(0) == os.getpid(), flush=True)
{end}
"""


def script(folder: Path, end: str) -> Path:
    file = folder / "script.py"
    file.write_text(SCRIPT.format(end=end))
    return file


@pytest.mark.parametrize(("end", "code"), [("", 0), ("sys.exit(3)", 3), ("sys.exit('so')", 1), ("raise OSError('so')", 1)])
def test_a_script_has_its_own_surroundings_and_ends_as_it_does(tmp_path: Path, end: str, code: int) -> None:
    output = tmp_path / "output"
    assert warm.run_script(script(tmp_path, end), ["a", "b"], tmp_path, {"ONLY": "this"}, output, 60) == code
    said = output.read_text()
    assert said.startswith(f"['a', 'b'] {tmp_path} this False True\nNone True\n")
    assert said.rstrip().endswith("so") is ("so" in end)


def test_one_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(TimeoutError, match="takes longer than 1 s"):
        warm.run_script(script(tmp_path, "print(os.getpid(), flush=True); time.sleep(600)"), [], tmp_path, {}, output, 1)
    killed = int(output.read_text().split()[-1])
    wait_until(lambda: not psutil.pid_exists(killed))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on(tmp_path: Path, number: signal.Signals) -> None:
    end = f"import signal; signal.signal({int(number)}, lambda *_: sys.exit(7)); print(flush=True); time.sleep(600)"
    command = [*warm.python(warm.SERVER.address()), str(script(tmp_path, end))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path) as client:
        assert client.stdout
        for _ in range(3):
            client.stdout.readline()
        client.send_signal(number)
        try:
            assert client.wait(30) == 7
        finally:
            client.kill()


@pytest.mark.parametrize("killed", ["client", "worker"])
def test_a_worker_and_the_process_in_whose_place_it_is_end_together(tmp_path: Path, killed: str) -> None:
    python = warm.python(warm.SERVER.address())
    file = script(tmp_path, "print(os.getpid(), flush=True); time.sleep(600)")
    environment = {**os.environ, "ONLY": "this"}
    with subprocess.Popen([*python, str(file), "a"], stdout=subprocess.PIPE, env=environment, cwd=tmp_path) as client:
        assert client.stdout
        lines = [client.stdout.readline().decode() for _ in range(3)]
        assert lines[0] == f"['a'] {tmp_path} this True True\n"
        worker = psutil.Process(int(lines[2]))
        (client if killed == "client" else worker).kill()
        assert client.wait(60) != 0
        wait_until(lambda: not worker.is_running())
