"""A Ray cluster of real processes on this machine, on free ports, ended by process id.

It lives in a temporary folder of its own, so a Ray that the user runs is neither seen nor touched; `ray stop`, which
would end that one too, is never called.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 120
HEAD_GRACE_S = 4  # its jobs have ended: nothing is written any more, and by itself it takes 10 to 20 s
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nothing listens on now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def end_process(process: subprocess.Popen[Any], grace_s: float = 20) -> None:
    """End `process` and every process below it: SIGTERM, and SIGKILL for what is left after `grace_s`."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    _, alive = psutil.wait_procs(family, timeout=2)
    for p in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()
    psutil.wait_procs(alive, timeout=10)
    process.wait(10)


def run_shown(
    command: Sequence[str], folder: Path, env: Mapping[str, str], meanwhile: Callable[[str], None] = lambda line: None
) -> tuple[int, str]:
    """Run `command` in `folder`, its output shown as it comes; every process of it ends with the call.

    Args:
        meanwhile: is given each line of the output.

    Returns:
        The exit code and the output.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=env, start_new_session=True)
    lines = []
    try:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            meanwhile(line)
        return process.wait(), "".join(lines)
    finally:
        if process.poll() is None:
            end_process(process)


@dataclass(frozen=True)
class Cluster:
    """A running head: where jobs are submitted, and where drivers connect."""

    dashboard: str  # http://127.0.0.1:PORT, for `ray job submit --address`
    address: str  # 127.0.0.1:PORT, for RAY_ADDRESS
    env: dict[str, str]  # what a client needs: the token that this cluster asks for


@contextlib.contextmanager
def local_cluster(cpus: int, env: dict[str, str] | None = None) -> Iterator[Cluster]:
    """Start a Ray head with `cpus` CPUs and the job server; end all of it when the block is left, however it is.

    Args:
        env: what its processes, and so all jobs, see in their environment beside this process's own: keys belong
            here and not in a job's runtime environment, which Ray shows in plain text.

    Raises:
        RuntimeError: it did not come up; the message holds the end of its log.
    """
    folder = Path(tempfile.mkdtemp(prefix="vswin-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))  # noqa: S108
    log = folder / "head.log"
    port, dashboard, agent, grpc, client = free_ports(5)
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={grpc}",
        f"--ray-client-server-port={client}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--num-cpus={cpus}",
        f"--object-store-memory={256 << 20}",
        f"--temp-dir={folder}",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # jobs run this same Python
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # nobody else's jobs run here
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {}), "PATH": path, **token},
        )
    try:
        url = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(f"{url}/api/jobs/", process, log)
        yield Cluster(url, f"127.0.0.1:{port}", token)
    finally:
        end_process(process, HEAD_GRACE_S)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310
                return
        except urllib.error.HTTPError as error:
            if error.code == 401:  # it answers, and wants the token
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"Ray did not start within {START_TIMEOUT_S} s:\n{log.read_text(errors='replace')[-2000:]}")
