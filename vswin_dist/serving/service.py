"""What a model answers over HTTP, whatever runs it: a page, an API with its description, and limits.

Videos stand in the bodies of requests. No path and no URL that a request names is opened.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import av
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from torch import Tensor

import vswin_dist
from vswin_dist import pages
from vswin_dist.data.transforms.normalise import to_rgb
from vswin_dist.data.video.decode import Limits
from vswin_dist.errors import DataError
from vswin_dist.serving.predict import Predictor
from vswin_dist.serving.sources import read_video
from vswin_dist.video import jpeg

TOP = 5
MOST_FRAMES = 64  # shown of a video
PICTURE_WIDTH = 160  # pixels
# The share of the seconds for an answer in which a video's frames are to be counted. They are decoded again for its views,
# and the model is asked then: a video that takes too long is refused, and not answered for ever that the service is busy.
DECODING = 1 / 3


@dataclass(frozen=True)
class ServiceLimits:
    """What a request may bring, and how long it may take."""

    megabytes: float = 64
    videos: int = 16  # of one request
    seconds: float = 30  # for the body to arrive, and for the answer; see `DECODING`
    pixels: int = 4096 * 2304  # of a frame

    @property
    def of_a_video(self) -> Limits:
        """Those of its decoding."""
        return Limits(DECODING * self.seconds, self.pixels)


class ClassScore(BaseModel):
    """A class and its probability."""

    name: str
    probability: float


class Prediction(BaseModel):
    """The most probable classes of a video, the most probable first."""

    classes: list[ClassScore]
    frames: Annotated[list[str], Field(description="JPEG pictures as `data:` URLs, of the frames that the model saw")] = []


class Failure(BaseModel):
    """Why there is no prediction."""

    error: str


class Videos(BaseModel):
    """Several videos."""

    videos: Annotated[list[str], Field(description="what stands in each file, as base64")]


class Predictions(BaseModel):
    """Of each video, in their order, a prediction or why there is none."""

    predictions: list[Prediction | Failure]


class Health(BaseModel):
    """What is served."""

    status: str
    model: str
    classes: int


@dataclass(frozen=True)
class Engine:
    """A model that answers for single videos: they are decoded in threads.

    Args:
        model: its name.
        score: views [V, ...] of a video -> probabilities [K]; many are asked at once.
    """

    model: str
    predictor: Predictor
    limits: ServiceLimits
    score: Callable[[Tensor], Awaitable[Tensor]]
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(min(4, os.cpu_count() or 1)))

    async def predict(self, data: bytes, frames: int) -> Prediction:
        """Answer for the file `data`, with `frames` of its frames.

        Raises:
            HTTPException: 422 where it cannot be decoded or exceeds the limits, 503 where the answer takes too long.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limits.seconds):
                views = await loop.run_in_executor(self.threads, self.predictor.views, data)
                best = self.predictor.best(await self.score(views), TOP)
                shown = await loop.run_in_executor(self.threads, pictures, views, frames) if frames else []
        except DataError as error:
            raise HTTPException(422, str(error)) from error
        except TimeoutError as error:
            text = f"no answer within {self.limits.seconds:g} s: the service is busy, ask again"
            raise HTTPException(503, text, {"Retry-After": "5"}) from error
        return Prediction(classes=[ClassScore(name=n, probability=p) for n, p in best], frames=shown)

    async def predict_or_say(self, video: str) -> Prediction | Failure:
        """Answer for a video in base64, or say why there is no answer."""
        try:
            return await self.predict(read_video(video if video.startswith("data:") else f"data:,{video}"), 0)
        except DataError as error:
            return Failure(error=str(error))
        except HTTPException as error:
            return Failure(error=error.detail)


def pictures(views: Tensor, count: int) -> list[str]:
    """Make JPEG pictures of `count` frames of the middle one of `views`, evenly spaced, as `data:` URLs."""
    middle = len(views) // 2
    clip = to_rgb(views[middle : middle + 1])[0].permute(1, 2, 3, 0)  # [T, S, S, 3]
    count = min(count, len(clip))
    chosen = clip[[int((i + 0.5) * len(clip) / count) for i in range(count)]]
    return [jpeg(av.VideoFrame.from_ndarray(picture, "rgb24"), PICTURE_WIDTH) for picture in chosen.contiguous().numpy()]


async def read_body(request: Request, limits: ServiceLimits) -> bytes:
    """Read the body of a request.

    Raises:
        HTTPException: 400 where it is empty, 408 where it takes too long, 413 where it is too large: what is left of it then
            is not read.
    """
    most, data = int(limits.megabytes * 1e6), bytearray()
    too_large = HTTPException(
        413, f"the body has more than {limits.megabytes:g} MB: cut the video shorter, or encode it anew"
    )
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:
        raise too_large
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {limits.seconds:g} s") from error
    if not data:
        raise HTTPException(400, "the body is empty: send what stands in a video file")
    return bytes(data)


def _body(schema: dict[str, Any], *kinds: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}


def build_app(engine: Engine) -> FastAPI:
    """Make the application that answers with `engine`."""
    about = f"Video Swin Transformer {engine.model}"
    app = FastAPI(title=about, version=vswin_dist.__version__, docs_url=None, redoc_url=None)
    why = {code: {"model": Failure} for code in (400, 408, 413, 422, 503)}
    video = _body({"type": "string", "format": "binary"}, "video/*", "application/octet-stream")
    many = _body(Videos.model_json_schema(), "application/json")

    @app.get("/health")
    async def health() -> Health:
        """Say what is served."""
        return Health(status="ok", model=engine.model, classes=len(engine.predictor.card.classes))

    @app.post("/predict", openapi_extra=video, responses=why)  # type: ignore[arg-type]
    async def predict(request: Request, frames: Annotated[int, Query(ge=0, le=MOST_FRAMES)] = 0) -> Prediction:
        """Name the five most probable classes of the video in the body; with pictures of `frames` frames of it."""
        return await engine.predict(await read_body(request, engine.limits), frames)

    @app.post("/predict/many", openapi_extra=many, responses=why)  # type: ignore[arg-type]
    async def predict_many(request: Request) -> Predictions:
        """Name the five most probable classes of each video; of a bad one, what is wrong with it."""
        try:
            asked = Videos.model_validate_json(await read_body(request, engine.limits)).videos
        except ValidationError as error:
            raise HTTPException(422, f'not {{"videos": [BASE64, ...]}}: {error.errors()[0]["msg"]}') from error
        if len(asked) > engine.limits.videos:
            raise HTTPException(413, f"{len(asked)} videos in one request: send at most {engine.limits.videos}")
        return Predictions(predictions=await asyncio.gather(*(engine.predict_or_say(v) for v in asked)))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        classes = len(engine.predictor.card.classes)
        return pages.render(
            "serving.html", title="Video Swin Transformer", model=engine.model, classes=classes, limits=engine.limits
        )

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return pages.render("api.html", title=about, api=app.openapi())

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)

    return app
