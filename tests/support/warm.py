"""Processes forked from one that has imported what jobs and ranks import: a third of what a short training computes.

A process has its own arguments, environment, working folder, session and output, and ends as a script does. Jobs are run so
by `run_script`, and Ray's workers where a job's environment is `for_ray`: Ray takes for its Python this file as a
program, which stays in the place of the process that it asks for: it ends with it, what ends it ends that one, and SIGTERM
and SIGINT are handed on. So are jobs that a test wants to signal or to kill.

What is imported anew, as a user's is: all of `Line.anew`, where what is imported counts, or which process is below which;
and with pytest's option `--anew` all of them, since starts are a part of what a fault costs.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn


@contextlib.contextmanager
def _forked(
    address: str, command: Sequence[str], folder: str, environment: Mapping[str, str], stdio: Sequence[str]
) -> Iterator[socket.socket]:
    """A process that runs `command`, a script and its arguments; it is killed where the block leaves it running.

    Args:
        stdio: the files of its input, its output and its errors.

    Yields:
        What gives a line with its process id, and as it ends one with its exit code.
    """
    request = {"command": [*command], "folder": folder, "environment": dict(environment), "stdio": [*stdio]}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        server.sendall(json.dumps(request).encode() + b"\n")
        yield server


class _Server:
    """The process that others are forked from, one of each pytest process; started when it is asked for.

    Attributes:
        used: False with the option `--anew`.
    """

    def __init__(self) -> None:
        self.used = True
        self._process: Any = None
        self._ours: Any = None
        self._folder = Path()

    def address(self) -> str:
        """Where it listens."""
        if self._process is None:
            self._folder = Path(tempfile.mkdtemp(prefix="vs-", dir="/tmp"))  # a socket's path is short
            context: Any = multiprocessing.get_context("forkserver")  # whose server ranks are forked from, too
            context.set_forkserver_preload(["tests.support.rank_imports"])
            self._ours, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(f"{self._folder}/socket", theirs))
            self._process.start()
            theirs.close()
            self._ours.recv()  # it listens
        return f"{self._folder}/socket"

    def stop(self) -> None:
        """End it, and what was forked from it."""
        if self._process is not None:
            self._ours.close()
            self._process.join()
            shutil.rmtree(self._folder)
            self._process = None


SERVER = _Server()
NO_SPARE_WORKERS = {"RAY_prestart_worker_first_driver": "0"}  # they would be of Ray's own Python, and not used


def for_ray() -> dict[str, str]:
    """What a job has in its environment whose Ray is to fork its workers."""
    environment = {"py_executable": " ".join(python(SERVER.address()))}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": environment}), **NO_SPARE_WORKERS}


def python(address: str) -> list[str]:
    """The command for Python that runs a script forked from the server at `address`."""
    return [sys.executable, "-I", "-S", __file__, address]


def run_script(
    script: Path, args: Sequence[str], folder: Path, environment: Mapping[str, str], output: Path, timeout_s: float
) -> int:
    """Run `script` in `folder` to its end, its output in the file `output`; the exit code.

    Raises:
        TimeoutError: it takes longer than `timeout_s`; it is killed.
    """
    stdio = (os.devnull, str(output), str(output))
    with _forked(SERVER.address(), [str(script), *args], str(folder), environment, stdio) as process:
        process.settimeout(timeout_s)
        try:
            _, code = process.makefile().read().split()
            return int(code)
        except TimeoutError as error:
            raise TimeoutError(f"{script} takes longer than {timeout_s:g} s:\n{output.read_text()[-6000:]}") from error


def serve(address: str, starter: Connection) -> None:
    """Fork a process for each that asks at `address`, until `starter` is closed by the process that started this."""
    asking: dict[int, socket.socket] = {}  # by the process that was forked for it
    with selectors.DefaultSelector() as selector, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(128)
        starter.send(None)
        selector.register(starter, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is starter:
                    for pid in asking:
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    request = connection.makefile("rb").readline()
                    if not request.endswith(b"\n"):  # who asked has ended in the middle
                        connection.close()
                        continue
                    if not (pid := os.fork()):
                        _become(**json.loads(request))
                    with contextlib.suppress(OSError):
                        connection.sendall(f"{pid}\n".encode())
                    asking[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                elif isinstance(key.fileobj, socket.socket):  # who asked is gone
                    if key.data in asking:
                        selector.unregister(key.fileobj)
                        os.kill(key.data, signal.SIGKILL)
                else:
                    code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    connection = asking.pop(key.data)
                    with contextlib.suppress(KeyError):
                        selector.unregister(connection)
                    with connection, contextlib.suppress(OSError):
                        connection.sendall(f"{code}\n".encode())


def _forget_multiprocessing() -> None:
    """Be a main process, with no process of multiprocessing's above it or to be asked for more."""
    from tests.support.rank_imports import MAIN_PROCESS

    multiprocessing.process._current_process = MAIN_PROCESS  # type: ignore[attr-defined]
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    for helper in (multiprocessing.forkserver._forkserver, multiprocessing.resource_tracker._resource_tracker):
        type(helper).__init__(helper)


def _become(command: list[str], folder: str, environment: dict[str, str], stdio: list[str]) -> NoReturn:
    code: object = 1
    try:
        _forget_multiprocessing()
        os.closerange(3, 1 << 10)
        os.setsid()
        for number, path in enumerate(stdio):
            try:
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY)
            except OSError:  # a socket
                file = os.open(os.devnull, os.O_RDWR)
            os.dup2(file, number)
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = command
        sys.path[:0] = [str(Path(command[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        finally:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        if not isinstance(code, int):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _stand_in(address: str, command: Sequence[str]) -> int:
    """Ask for a process that runs `command`, hand on SIGTERM and SIGINT to it, and return its exit code."""
    handed_on = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, handed_on)  # until there is somebody to hand them on to
    place = f"/proc/{os.getpid()}/fd/"
    with _forked(address, command, os.getcwd(), os.environ, [f"{place}{n}" for n in range(3)]) as server:
        answers = server.makefile()
        pid = int(answers.readline())
        for number in handed_on:
            signal.signal(number, lambda received, _: os.kill(pid, received))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handed_on)
        return int(answers.readline() or 1)


if __name__ == "__main__":
    sys.exit(_stand_in(sys.argv[1], sys.argv[2:]))
