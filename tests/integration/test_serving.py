"""`python -m vswin_dist.serving` on a real Ray cluster, asked over HTTP by many at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.line import REPOSITORY, Line
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from vswin_dist.config.schema import DataSettings
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import build_model
from vswin_dist.models.weights.portable import write_model
from vswin_dist.serving.predict import load_predictor


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A small real model with random weights."""
    data = DataSettings(train="x", sampling="dense", frames=4, stride=1, size=32, short_side=32)
    classes = [f"class {i}" for i in range(6)]
    model = build_model("swin_nano", num_classes=6)
    return write_model(str(tmp_path / "model"), model, classes=classes, preprocessing=preprocessing_of(data), lineage={})


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        content = answer.read().decode()
        return answer.status, json.loads(content) if answer.headers["Content-Type"] == "application/json" else content
    finally:
        connection.close()


@contextlib.contextmanager
def serving(line: Line, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command, ended as a batch system ends it; it must end in order."""
    line.home.mkdir(parents=True, exist_ok=True)
    with (line.home / "serving.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vswin_dist.serving", *words],
            cwd=REPOSITORY,
            env=line.environment,
            stdout=log,
            stderr=log,
            text=True,
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_cluster_that_serves_already_is_refused_and_goes_on(cluster_line: Line, folder: str) -> None:
    line, port = cluster_line, free_port()
    with serving(line, folder, "--port", str(port)) as process:
        wait_until(lambda: "serving " in (line.home / "serving.log").read_text(), process)
        words = [sys.executable, "-m", "vswin_dist.serving", folder, "--port", str(free_port())]
        second = subprocess.run(words, cwd=REPOSITORY, env=line.environment, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2, second.stderr
        assert "Ray Serve runs on this cluster already: vswin (RUNNING). End the service that started it" in second.stderr
        assert ask(port, "GET", "/health")[0] == 200


def test_many_clients_are_answered_together_and_bad_requests_alone(cluster_line: Line, folder: str) -> None:
    line, port = cluster_line, free_port()
    videos = sorted((line.shards / "videos").rglob("*.mp4"))[:6]
    expected = {str(p.video): [name for name, _ in p.top] for p in load_predictor(folder).predict(map(str, videos))}
    with serving(line, folder, "--port", str(port), "--batch", "4", "--max-mb", "1") as process:
        wait_until(lambda: "serving " in (line.home / "serving.log").read_text(), process)
        assert ask(port, "GET", "/health") == (200, {"status": "ok", "model": folder, "classes": 6})
        bodies = [b"no video" if i % 4 == 3 else videos[i % 6].read_bytes() for i in range(32)]
        with ThreadPoolExecutor(8) as clients:
            found = list(clients.map(lambda body: ask(port, "POST", "/predict", body), bodies))
        for i, (status, answer) in enumerate(found):
            if i % 4 == 3:
                assert status == 422 and "cannot be decoded" in answer["error"]
            else:
                assert status == 200
                assert [c["name"] for c in answer["classes"]] == expected[str(videos[i % 6])]
        assert ask(port, "POST", "/predict", b"x" * 1_000_001)[0] == 413
        assert "Drop a video here" in ask(port, "GET", "/")[1]
