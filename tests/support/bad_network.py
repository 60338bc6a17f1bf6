"""A way to an HTTP server as it is in bad hours: late, answering with errors, cutting, shortening and flipping bytes.

`python -m tests.support.bad_network SERVER_PORT PORT DELAY_S` leads PORT to SERVER_PORT, each answer late, until it is
interrupted.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal

Fault = Literal["error", "cut", "shorten", "flip"]
EXPECT, CONTINUE = b"expect: 100-continue\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"


def _head(stream: BinaryIO) -> tuple[list[bytes], int]:
    """The lines of a request or an answer up to its body, and the body's length."""
    lines, length = [], 0
    while (line := stream.readline()) not in (b"\r\n", b""):
        lines.append(line)
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return lines, length


def _chunks(stream: BinaryIO) -> bytes:
    """A body that is sent in chunks, as it is sent; answers to the removal of many objects are."""
    found, size = b"", 1
    while size:
        line = stream.readline()
        size = int(line, 16)
        found += line + stream.read(size + 2)
    return found


def _serve(client: socket.socket, port: int, delay_s: float, fault: Callable[[str], Fault | None]) -> None:
    with (
        contextlib.suppress(OSError),
        client,
        client.makefile("rb") as asked,
        socket.create_connection(("127.0.0.1", port)) as server,
        server.makefile("rb") as answered,
    ):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            lines, length = _head(asked)
            if not lines:
                return
            if EXPECT in (asks := [line.lower() for line in lines]):  # a client that uploads waits for this
                client.sendall(CONTINUE)
                del lines[asks.index(EXPECT)]
            if len(content := asked.read(length)) < length:
                return  # the client died in its upload: the server must not wait for the rest of it
            server.sendall(b"".join(lines) + b"\r\n" + content)
            time.sleep(delay_s)
            what = fault(lines[0].decode())
            answer, length = _head(answered)
            body = answered.read(length) if not lines[0].startswith(b"HEAD") else b""
            if any(line.lower() == CHUNKED for line in answer):
                body = _chunks(answered)
            if what == "error":
                client.sendall(ERROR)
                continue
            if what == "cut":
                client.sendall(b"".join(answer) + b"\r\n" + body[: len(body) // 2])
                return
            if what == "shorten":  # a whole answer, of which the object's end is missing
                body = body[: len(body) // 2]
                answer = [x for x in answer if not x.lower().startswith((b"content-length", b"content-range"))]
                answer.append(f"Content-Length: {len(body)}\r\n".encode())
            if what == "flip" and body:
                body = body[:-1] + bytes([body[-1] ^ 0xFF])
            client.sendall(b"".join(answer) + b"\r\n" + body)


@contextlib.contextmanager
def bad_network(
    port: int, delay_s: float = 0.0, fault: Callable[[str], Fault | None] = lambda _: None, own_port: int = 0
) -> Iterator[int]:
    """A port (`own_port`, or a free one) that leads to `port` of this machine; `fault` says what becomes of the answer to
    a request line."""
    listener = socket.create_server(("127.0.0.1", own_port))

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=_serve, args=(client, port, delay_s, fault), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


if __name__ == "__main__":
    with (
        contextlib.suppress(KeyboardInterrupt),
        bad_network(int(sys.argv[1]), float(sys.argv[3]), own_port=int(sys.argv[2])) as listening,
    ):
        print(f"127.0.0.1:{listening} leads to port {sys.argv[1]}", flush=True)
        threading.Event().wait()
