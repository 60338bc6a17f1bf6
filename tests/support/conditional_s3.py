"""An S3 server that knows conditional writes, as Amazon's does and rclone's does not: rclone's behind a guard."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.support.s3_server import S3Server

REFUSAL = b"<Error><Code>PreconditionFailed</Code><Message>the object is there</Message></Error>"


@contextlib.contextmanager
def conditional(server: S3Server) -> Iterator[str]:
    """The endpoint of a guard before `server`: it refuses a PUT with `If-None-Match: *` of an object that is there."""
    one_at_a_time = threading.Lock()

    class Guard(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with one_at_a_time:
                there = (server.folder / unquote(urlsplit(self.path).path).lstrip("/")).exists()
                if self.headers.get("If-None-Match") == "*" and there:
                    return self.answer(412, {"Content-Type": "application/xml"}, REFUSAL)
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() != "expect":
                        connection.putheader(name, value)
                connection.endheaders(body)
                found = connection.getresponse()
                data = found.read()
                connection.close()
            dropped = ("transfer-encoding", "connection", "date", "server")
            self.answer(found.status, {k: v for k, v in found.headers.items() if k.lower() not in dropped}, data)

        def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward

    guard = ThreadingHTTPServer(("127.0.0.1", 0), Guard)
    threading.Thread(target=guard.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{guard.server_port}"
    finally:
        guard.shutdown()
        guard.server_close()
