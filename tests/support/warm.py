"""Processes forked from one that has imported what jobs and ranks import: five to eight seconds of computing saved for each.

A process has its own arguments, environment, working folder, session and output, and ends as a script does. Jobs are run so
by `run_script`, and Ray's workers where a job's environment is `for_ray`: Ray takes for its Python this file as a
program, which stays in the place of the process that it asks for: it ends with it, and what ends it ends that one.

What is imported anew, as a user's is: jobs that `Line.start` starts, where a signal or a kill during their imports may
count; all of `Line.anew`; and with pytest's option `--anew` all of Ray's workers, whose starts are a part of what a fault
costs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn


@contextlib.contextmanager
def _forked(
    address: str, command: Sequence[str], folder: str, environment: Mapping[str, str], stdio: Sequence[str]
) -> Iterator[socket.socket]:
    """A process that runs `command`, a script and its arguments; it is killed where the block leaves it running.

    Args:
        stdio: the files of its input, its output and its errors.

    Yields:
        What gives its exit code in decimal as it ends.
    """
    request = {"command": [*command], "folder": folder, "environment": dict(environment), "stdio": [*stdio]}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        server.sendall(json.dumps(request).encode() + b"\n")
        yield server


class _Server:
    """The process that others are forked from, one of each pytest process; started when it is asked for.

    Attributes:
        for_ray: whether Ray's workers are.
    """

    def __init__(self) -> None:
        self.for_ray = True
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = Path()

    def address(self) -> str:
        """Where it listens."""
        if self.process is None:
            self.folder = Path(tempfile.mkdtemp(prefix="vs-", dir="/tmp"))  # a socket's path is short
            command = [sys.executable, "-m", "tests.support.warm", "serve", f"{self.folder}/socket"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}  # which torch reads as it is imported
            pipe, root = subprocess.PIPE, Path(__file__).parents[2]
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, cwd=root)
            assert self.process.stdout
            self.process.stdout.readline()  # it listens, or has ended
        return f"{self.folder}/socket"

    def stop(self) -> None:
        """End it, and what was forked from it."""
        if self.process is not None:
            assert self.process.stdin
            self.process.stdin.close()
            self.process.wait()
            shutil.rmtree(self.folder)
            self.process = None


SERVER = _Server()
NO_SPARE_WORKERS = {"RAY_prestart_worker_first_driver": "0"}  # they would be of Ray's own Python, and not used


def for_ray() -> dict[str, str]:
    """What a job has in its environment whose Ray is to fork its workers; nothing where it is not to."""
    if not SERVER.for_ray:
        return {}
    python = f"{sys.executable} -I -S {__file__} {SERVER.address()}"
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"py_executable": python}}), **NO_SPARE_WORKERS}


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
            return int(process.recv(16))
        except TimeoutError as error:
            raise TimeoutError(f"{script} takes longer than {timeout_s:g} s:\n{output.read_text()[-6000:]}") from error


def serve(address: str) -> None:
    """Fork a process for each that asks at `address`, until the one that started this ends."""
    import tests.support.rank_imports  # noqa: F401

    gc.collect()
    gc.freeze()  # else each child's first collection copies all of it
    asking: dict[int, socket.socket] = {}  # by the process that was forked for it
    with selectors.DefaultSelector() as selector, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(128)
        print(flush=True)
        selector.register(sys.stdin, selectors.EVENT_READ)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    for pid in asking:
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    request = json.loads(connection.makefile("rb").readline() or b"null")
                    if request is None:
                        connection.close()
                        continue
                    if not (pid := os.fork()):
                        _become(**request)
                    asking[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                elif isinstance(key.fileobj, socket.socket):  # who asked is gone
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
                        connection.sendall(str(code).encode())


def _become(command: list[str], folder: str, environment: dict[str, str], stdio: list[str]) -> NoReturn:
    import atexit
    import runpy
    import threading

    code: object = 1
    try:
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


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        place = f"/proc/{os.getpid()}/fd/"
        with _forked(sys.argv[1], sys.argv[2:], os.getcwd(), os.environ, [f"{place}{n}" for n in range(3)]) as server:
            sys.exit(int(server.recv(16) or 1))
