"""A Ray cluster of real processes on this machine, on free ports, ended by process id.

It lives in a temporary folder of its own, so a Ray that the user runs is neither seen nor touched; `ray stop`, which
would end that one too, is never called.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 120
OBJECT_STORE_BYTES = 256 << 20
STARTS = 3  # of a head whose port somebody took between the look for a free one and the start
# Above those that Ray gives its workers, below those that the system gives to connections: Ray listens on a port seconds
# after it was looked for, and a head that finds one of its own taken ends a while after it has answered.
PORTS = range(20_000, 32_768)
HEAD_GRACE_S = 4  # its jobs have ended: nothing is written any more, and by itself it takes 10 to 20 s
RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int, among: Sequence[int] = PORTS) -> list[int]:
    """Return TCP ports that nothing listens on now at any address, all different; at random, since others look too."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(among)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed lately is free
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                found += [port] if port not in found else []
    return found


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


def _end_if_running(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        end_process(process)


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
        _end_if_running(process)


def run_together(commands: Sequence[Sequence[str]], folder: Path, env: Mapping[str, str]) -> list[tuple[int, str]]:
    """As `run_shown`, for several commands at once; the output of each is shown when it and those before it have ended."""
    done = []
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes = []
        for command, output in zip(commands, outputs, strict=True):
            processes.append(subprocess.Popen(command, stdout=output, cwd=folder, env=env, start_new_session=True))
            stack.callback(_end_if_running, processes[-1])
        for process, output in zip(processes, outputs, strict=True):
            code = process.wait()
            output.seek(0)
            done.append((code, output.read()))
            print(done[-1][1], end="", flush=True)
    return done


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
    for attempt in range(STARTS):
        try:
            head = _Head(cpus, env or {})
            break
        except RuntimeError:
            if attempt == STARTS - 1:
                raise
    try:
        yield head.cluster
    finally:
        head.end()


class _Head:
    """The processes of a head, which answers."""

    def __init__(self, cpus: int, env: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vswin-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))  # noqa: S108
        log = self.folder / "head.log"
        gcs, dashboard, agent, grpc, client = free_ports(5)
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # nobody else's jobs run here
        self.cluster = Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", token)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # jobs run this same Python
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [
                    *start_command(cpus, agent, grpc),
                    "--head",
                    f"--port={gcs}",
                    f"--dashboard-port={dashboard}",
                    f"--ray-client-server-port={client}",
                    "--include-dashboard=true",
                    "--dashboard-host=127.0.0.1",
                    f"--temp-dir={self.folder}",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **env, "PATH": path, **token},
            )
        try:
            _wait_until_up(self.cluster, agent, self.process, log)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End all of it, and remove its folder."""
        end_process(self.process, HEAD_GRACE_S)
        shutil.rmtree(self.folder, ignore_errors=True)


def start_command(cpus: int, agent: int, grpc: int) -> list[str]:
    """Return the command that starts a node of Ray on this machine, its agent on the ports `agent` and `grpc`.

    It is a head with --head, and with --address one of a head's.
    """
    return [
        RAY,
        "start",
        "--block",
        "--disable-usage-stats",
        "--node-ip-address=127.0.0.1",
        f"--num-cpus={cpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={grpc}",
        "--min-worker-port=0",  # the system's choice: two nodes of a machine would look through the same ones
        "--max-worker-port=0",
    ]


def _wait_until_up(cluster: Cluster, agent: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the job server, and for the agent that runs its jobs: where that cannot start, all of the head ends."""
    deadline = time.monotonic() + START_TIMEOUT_S
    headers = {"Authorization": f"Bearer {cluster.env['RAY_AUTH_TOKEN']}"}
    to_answer = [f"http://127.0.0.1:{agent}/api/local_raylet_healthz", f"{cluster.dashboard}/api/jobs/"]
    while process.poll() is None and time.monotonic() < deadline:
        request = urllib.request.Request(to_answer[-1], headers=headers)  # noqa: S310
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):  # noqa: S310
            to_answer.pop()
            if not to_answer:
                return
        time.sleep(0.2)
    raise RuntimeError(f"Ray did not start within {START_TIMEOUT_S} s:\n{log.read_text(errors='replace')[-2000:]}")
