"""A real `mlflow server` for tests: sqlite backend, artifacts proxied into a folder, a free port, ended by its id."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.mlflow_store import new_store
from tests.support.ports import free_port
from tests.support.waiting import start_server


class MlflowServer:
    """`mlflow server` on `folder`; `uri` stays the same over `kill` and `start`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0  # the port is that of the first start
        self._process: subprocess.Popen[bytes] | None = None
        new_store(folder / "server.db")

    @property
    def uri(self) -> str:
        """``http://127.0.0.1:PORT``."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it answers."""
        is_new = not self.port

        def launch() -> subprocess.Popen[bytes]:
            if is_new:
                self.port = free_port()
            command = [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--workers",
                "1",
                "--backend-store-uri",
                f"sqlite:///{self.folder}/server.db",
                "--artifacts-destination",
                str(self.folder / "artifacts"),
                "--serve-artifacts",
            ]
            environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            environment.pop("MLFLOW_TRACKING_URI", None)
            with open(self.folder / "server.log", "ab") as log:
                self._process = subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
                )  # its workers end with it, by group
            return self._process

        start_server(launch, self._answers, self.stop, self.folder / "server.log")

    @property
    def group(self) -> int:
        """The id of the process group of the server and its workers."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and its workers; SIGSTOP makes it a server that hangs."""
        os.killpg(self.group, number)

    def stop(self) -> None:
        """End it at once, also when it is stopped."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=10) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """A started server that is ended at the end of the block."""
    server = MlflowServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
