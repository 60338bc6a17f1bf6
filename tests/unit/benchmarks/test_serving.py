"""The clients of the serving benchmark: how many requests they send, and what they count."""

from __future__ import annotations

import http.server
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from vswin_dist.benchmarks.serving import ask, mlflow_server, ray_server, with_broken


class Answering(http.server.BaseHTTPRequestHandler):
    """Takes 20 ms, and refuses bodies that begin with an n."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(0.02)
        self.send_response(422 if body.startswith(b"n") else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_address[1]
        server.shutdown()


def test_each_request_is_sent_once_and_its_answer_counted(port: int) -> None:
    bodies = itertools.cycle([b"yes", b"yes", b"no"])
    found = ask(ray_server("m", port), port, bodies, clients=4, most=30, seconds=60)
    assert found.statuses == Counter({200: 20, 422: 10}) and len(found.latencies) == 30
    assert min(found.latencies) >= 0.02
    assert next(bodies) == b"yes", "a body was taken that was not sent"
    few = ask(ray_server("m", port), port, bodies, clients=1, most=1, seconds=60)
    assert " requests/s, p50 0." in str(few)
    assert ask(ray_server("m", port), port, bodies, 2, 1 << 60, seconds=0.2).seconds < 5


def test_one_in_twenty_is_broken_in_three_ways() -> None:
    video = bytes(range(256)) * 4
    sent = list(itertools.islice(with_broken([video]), 60))
    assert [i for i, body in enumerate(sent, start=1) if body != video] == [20, 40, 60]
    assert len({sent[19], sent[39], sent[59]}) == 3


def test_mlflow_is_asked_in_its_own_form() -> None:
    [record] = json.loads(mlflow_server("m", 1).body(b"abc"))["dataframe_records"]
    assert record == {"video": "data:video/mp4;base64,YWJj"}
    assert ray_server("m", 1).body(b"abc") == b"abc"
