"""The service over HTTP in this process, with a real model and without Ray."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import uvicorn
from fastapi import HTTPException

from tests.support.chromium import chromium, drop_file
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from vswin_dist.config.schema import DataSettings
from vswin_dist.errors import run_command
from vswin_dist.model_card import preprocessing_of
from vswin_dist.models import VideoSwin
from vswin_dist.models.weights.portable import write_model
from vswin_dist.serving.__main__ import main
from vswin_dist.serving.predict import Predictor, load_predictor
from vswin_dist.serving.service import Engine, ServiceLimits, build_app
from vswin_dist.video import Video

LIMITS = ServiceLimits(megabytes=0.2, videos=3, seconds=20, pixels=100 * 100)


class Service:
    """The service at a port, and how it is asked."""

    def __init__(self, predictor: Predictor, port: int) -> None:
        self.predictor, self.port, self.asked = predictor, port, 0
        self.engine = Engine("m", predictor, LIMITS, self.score)
        config = uvicorn.Config(build_app(self.engine), host="127.0.0.1", port=port, log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.delay_s = 0.0

    async def score(self, views: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        await asyncio.sleep(self.delay_s)
        return self.predictor.scores([views])[0]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            content, kind = answer.read().decode(), answer.headers["Content-Type"]
            return answer.status, json.loads(content) if kind == "application/json" else content
        finally:
            connection.close()


@pytest.fixture(scope="module")
def service(network: VideoSwin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data = DataSettings(train="x", sampling="dense", frames=4, stride=2, size=32, short_side=40)
    classes = ["left", "right", "up"]
    folder = write_model(
        str(tmp_path_factory.mktemp("model")), network, classes=classes, preprocessing=preprocessing_of(data), lineage={}
    )
    running = Service(load_predictor(folder, limits=LIMITS.of_a_video), free_port())
    thread = threading.Thread(target=running.server.run)
    thread.start()
    wait_until(lambda: running.server.started, timeout_s=60)
    yield running
    running.server.should_exit = True
    thread.join(30)
    running.engine.threads.shutdown()


def large_video(width: int, height: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.fixture
def content(video: str) -> bytes:
    return Path(video).read_bytes()


def test_a_video_has_its_best_classes_and_the_frames_that_were_seen(service: Service, content: bytes, video: str) -> None:
    status, found = service.ask("POST", "/predict?frames=3", content)
    best = service.predictor.best(service.predictor.probabilities(video))
    assert status == 200 and [c["name"] for c in found["classes"]] == [name for name, _ in best]
    assert [c["probability"] for c in found["classes"]] == pytest.approx([p for _, p in best], abs=1e-6)
    pictures = [base64.b64decode(f.removeprefix("data:image/jpeg;base64,")) for f in found["frames"]]
    assert len(pictures) == 3 and all(p.startswith(b"\xff\xd8") for p in pictures) and pictures[0] != pictures[1]
    assert service.ask("POST", "/predict", content)[1]["frames"] == []


def test_a_bad_video_is_an_error_for_that_one_alone(service: Service, content: bytes) -> None:
    bad, good = base64.b64encode(b"no video").decode(), base64.b64encode(content).decode()
    status, found = service.ask("POST", "/predict/many", json.dumps({"videos": [good, bad, "é"]}).encode())
    one, two, three = found["predictions"]
    assert status == 200 and len(one["classes"]) == 3
    assert two["error"].startswith("the video: cannot be decoded") and three["error"].startswith("the video is no base64")


@pytest.mark.parametrize(
    ("path", "body", "status", "why"),
    [
        ("/predict", b"", 400, "the body is empty"),
        ("/predict", b"x" * 200_001, 413, "more than 0.2 MB"),
        ("/predict", b"no video", 422, "the video: cannot be decoded"),
        ("/predict?frames=many", b"x", 422, "query.frames"),
        ("/predict/many", b"{}", 422, "not {"),
        ("/predict/many", json.dumps({"videos": ["", "", "", ""]}).encode(), 413, "4 videos in one request"),
        ("/nowhere", b"x", 404, "Not Found"),
        ("/health", b"x", 405, "Method Not Allowed"),
    ],
)
def test_what_cannot_be_answered_says_why(service: Service, path: str, body: bytes, status: int, why: str) -> None:
    got, found = service.ask("POST", path, body)
    assert got == status and why in found["error"]


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(service: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    connection.request(
        "POST", "/predict", (b"x" * 50_000 for _ in range(5)), encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
    )
    answer = connection.getresponse()
    assert answer.status == 413
    connection.close()


def test_frames_that_are_too_large_are_refused_before_the_model_is_asked(service: Service) -> None:
    large, before = large_video(128, 96), service.asked
    status, found = service.ask("POST", "/predict", large)
    assert status == 422 and "frames of 128 x 96 have more than 10,000 pixels" in found["error"]
    assert service.asked == before


def test_an_answer_that_takes_too_long_is_an_error_that_asks_to_come_back(service: Service, content: bytes) -> None:
    service.delay_s, usual = 60.0, service.engine.limits
    object.__setattr__(service.engine, "limits", replace(LIMITS, seconds=0.5))
    try:
        status, found = service.ask("POST", "/predict", content)
    finally:
        service.delay_s = 0.0
        object.__setattr__(service.engine, "limits", usual)
    assert status == 503 and "no answer within 0.5 s" in found["error"]


def test_a_video_that_takes_too_long_to_decode_is_refused_and_not_told_to_come_back(
    folder: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, limits = Video.frames, ServiceLimits(seconds=3)

    def slowly(video: Video) -> Iterator[av.VideoFrame]:
        for frame in usual(video):
            time.sleep(0.4)
            yield frame

    async def score(views: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model is not asked")

    monkeypatch.setattr(Video, "frames", slowly)
    engine = Engine("m", load_predictor(folder, limits=limits.of_a_video), limits, score)
    with pytest.raises(HTTPException, match=r"decoding it takes more than 1 s") as refused:
        asyncio.run(engine.predict(content, 0))
    engine.threads.shutdown()
    assert refused.value.status_code == 422


def test_pages_and_description_need_nothing_from_elsewhere(service: Service) -> None:
    assert service.ask("GET", "/health") == (200, {"status": "ok", "model": "m", "classes": 3})
    for path in ("/", "/docs"):
        status, page = service.ask("GET", path)
        assert status == 200 and "<html" in page and not re.search(r"(src|href)=.?(https?:)?//", page)
    assert "POST /predict/many" in page and "as base64" in page
    api = service.ask("GET", "/openapi.json")[1]
    assert set(api["paths"]) == {"/health", "/predict", "/predict/many"}
    assert {"400", "408", "413", "422", "503"} <= set(api["paths"]["/predict"]["post"]["responses"])


def test_what_cannot_be_served_is_refused_before_anything_starts(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, why in (
        (("m", "--port", str(service.port)), f"cannot serve at 127.0.0.1:{service.port}: Address already in use"),
        (("m", "--port", "0"), "--port=0"),
        (("m", "--batch", "0"), "--batch=0"),
        ((str(tmp_path / "nowhere"), "--port", str(free_port())), "no model at"),
    ):
        monkeypatch.setattr(sys, "argv", ["serving", *words])
        assert run_command(main) == 2 and why in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_shows_the_frames_and_the_bars_of_a_video_that_is_dropped_on_it(
    service: Service, video: str, tmp_path: Path
) -> None:
    if chromium() is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    page = f"http://127.0.0.1:{service.port}/"
    seen = "document.images.length == 4 && [...document.images].every(i => i.complete && i.naturalWidth > 0)"
    bar = "r.querySelector('.bar').offsetWidth"
    shown = f"[...document.querySelectorAll('#classes tr')].map(r => [r.cells[0].textContent, {bar}])"
    rows = drop_file(page, video, "#drop", f"{seen} && {shown}", tmp_path)
    best = service.predictor.best(service.predictor.probabilities(video))
    assert [name for name, _ in rows] == [name for name, _ in best]
    widths = [width for _, width in rows]
    assert widths == sorted(widths, reverse=True) and widths[-1] > 0
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    said = drop_file(page, str(bad), "#drop", "document.querySelector('.error')?.textContent", tmp_path / "bad")
    assert said.startswith("bad.mp4: the video: cannot be decoded")
