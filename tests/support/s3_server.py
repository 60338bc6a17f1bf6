"""A real S3 server for tests: `rclone serve s3` with keys over a folder, on a free port, ended by its process id."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port
from tests.support.waiting import answers, start_server

ACCESS_KEY = "vswin-test-key"
SECRET_KEY = "vswin-test-secret"
BUCKET = "vswin"  # of the server that tests share


def rclone() -> str | None:
    """The rclone program, None where it is not installed."""
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


@dataclass
class S3Server:
    """A running server; the folders directly below `folder` are its buckets."""

    folder: Path
    port: int = 0  # that of the first start, also after a stop
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def bucket(self, name: str) -> str:
        """Make a bucket; returns its URL."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return f"s3://{name}"

    def path(self, url: str) -> Path:
        """The file or folder that holds what `url` names."""
        return self.folder / url.removeprefix("s3://")

    def start(self) -> None:
        """Start the server, where it does not run, and wait until it answers."""
        if self.process is not None:
            return
        is_new, log = not self.port, self.folder.with_name(f"{self.folder.name}.log")

        def launch() -> subprocess.Popen[bytes]:
            if is_new:
                self.port = free_port()
            program = rclone()
            assert program is not None
            address = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
            command = [program, "serve", "s3", *address, "--config", os.devnull, str(self.folder)]
            with log.open("ab") as output:
                self.process = subprocess.Popen(command, stdout=output, stderr=output)
            return self.process

        self.folder.mkdir(parents=True, exist_ok=True)
        start_server(launch, lambda: answers(self.endpoint), self.stop, log)

    def stop(self) -> None:
        """End the server, also where it was paused."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(60)
            self.process = None


@contextmanager
def start_s3(folder: Path) -> Iterator[S3Server]:
    """A server over `folder` for the time of the block."""
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
