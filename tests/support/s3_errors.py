"""A proxy before an S3 server that answers a share of the requests with errors, as overloaded object stores do."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ERRORS = {500: "InternalError", 503: "SlowDown"}


@dataclass
class Errors:
    """Which requests fail: `share` of them at random, and all of the next `burst`. `given` counts them."""

    share: float
    dice: random.Random
    burst: int = 0
    given: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    endpoint: str = ""

    def draw(self) -> int:
        """The status to fail with, 0 for none."""
        with self.lock:
            fails = self.burst > 0 or self.dice.random() < self.share
            self.burst = max(0, self.burst - 1)
            self.given += fails
            return self.dice.choice(list(ERRORS)) if fails else 0


@contextmanager
def failing_proxy(port: int, errors: Errors) -> Iterator[Errors]:
    """A proxy before the server at `port` for the time of the block; its address is `errors.endpoint`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Quiet."""

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if status := errors.draw():
                text = f"<Error><Code>{ERRORS[status]}</Code><Message>from the test</Message></Error>".encode()
                self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text)
                return
            server = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            try:
                server.request(self.command, self.path, body, dict(self.headers.items()))
                answer = server.getresponse()
                data = answer.read()
            finally:
                server.close()
            headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
            if not any(k.lower() == "content-length" for k, _ in headers):
                headers.append(("Content-Length", str(len(data))))
            self._answer(answer.status, headers, data)

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    errors.endpoint = f"http://127.0.0.1:{proxy.server_port}"
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield errors
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
