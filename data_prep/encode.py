"""One video in, one outcome out: verified by decoding it completely once, encoded on the way where the profile says so.

The bytes depend on the input, the settings and the FFmpeg build alone: one encoder thread, fixed group of pictures,
scaling with exact rounding.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import platform
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import av
import av.error
import av.filter

from data_prep.probe import KEPT, Facts, Rejected, Video
from data_prep.settings import Encoding

# x264's AVX-512 code was seen to give now and then other bytes for the same frames (3 encodings in 100, AMD EPYC,
# libavcodec 62.28); AVX2 and below never did. Other processors take x264's own choice.
STABLE_CODE = {"x264-params": "asm=avx2"} if platform.machine() in ("x86_64", "AMD64") else {}
_TURN = {90: ("transpose", "cclock"), 180: ("hflip,vflip", ""), 270: ("transpose", "clock")}


@dataclass
class Outcome:
    """What became of one video. The fields after `detail` hold for a kept one and describe the bytes to be packed."""

    verdict: str
    detail: str = ""
    content: str = ""  # 32 hex digits over the bytes that were read
    extension: str = ""
    size: int = 0
    crc32: int = 0
    frames: int = 0
    fps: float = 0.0
    duration: float = 0.0
    width: int = 0
    height: int = 0

    @property
    def kept(self) -> bool:
        """True where the video goes into a shard."""
        return self.verdict == KEPT

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``Outcome(**d)`` makes it again."""
        return asdict(self)


def process(data: bytes, encoding: Encoding, name: str) -> tuple[Outcome, bytes]:
    """Verify `data` and make the bytes to pack (the same object where they are kept). `name` is the file's."""
    content = hashlib.sha256(data).hexdigest()[:32]
    try:
        facts, made = transcode(data, encoding, name) if encoding.transcodes else (verify(data, encoding, name), data)
    except Rejected as rejected:
        return Outcome(rejected.reason, rejected.detail, content), b""
    return Outcome(KEPT, "", content, facts.extension, len(made), zlib.crc32(made), facts.frames, facts.fps,
                   facts.duration, facts.width, facts.height), made


def verify(data: bytes, encoding: Encoding, name: str = "") -> Facts:
    """Decode everything and give the facts. Raises Rejected."""
    with Video(data, encoding, name) as video:
        for _ in video.frames():
            pass
        return video.facts()


def target_size(displayed: tuple[int, int], encoding: Encoding) -> tuple[int, int]:
    """Width and height of the encoded video: the short side as asked for, never larger than it was, both even."""
    scale = 1.0
    if encoding.profile == "train":
        scale = min(1.0, encoding.short_side / min(displayed))
    width, height = (max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in displayed)
    return width, height


def transcode(data: bytes, encoding: Encoding, name: str = "") -> tuple[Facts, bytes]:
    """Decode everything once, encoding on the way; the facts are those of the encoded video. Raises Rejected."""
    with Video(data, encoding, name) as video:
        writer = _Writer(video, encoding)
        failure: av.error.FFmpegError | None = None
        for frame in video.frames():
            if failure is None:
                try:
                    writer.write(frame)
                except av.error.FFmpegError as error:
                    failure = error  # decode on: the verdict on the source comes first
        facts = video.facts()
        try:
            made = writer.finish()
        except av.error.FFmpegError as error:
            failure = failure or error
        if failure is not None:
            raise Rejected("encode_failed", str(failure)) from failure
        facts.width, facts.height = writer.size
        facts.extension = "mp4"
        if encoding.max_fps:
            facts.frames = writer.frames
            facts.fps = round(writer.frames / facts.duration, 3)
        return facts, made


class _Writer:
    """Scales, turns and encodes frames into an mp4 in memory."""

    def __init__(self, video: Video, encoding: Encoding) -> None:
        self.video = video
        self.encoding = encoding
        self.size = (0, 0)
        self.frames = 0
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp4")
        self._stream: Any = None
        self._graph: av.filter.Graph | None = None
        self._shape: tuple[Any, ...] = ()
        self._last_pts = -1
        self._first_pts: int | None = None

    def write(self, frame: Any) -> None:
        """Encode one decoded frame."""
        for ready in self._scaled(frame):
            self._encode(ready)

    def finish(self) -> bytes:
        """The whole file's bytes."""
        if self._graph is not None:
            self._graph.push(None)
            for frame in self._pull():
                self._encode(frame)
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._file.getvalue()

    def _scaled(self, frame: Any) -> Iterator[Any]:
        if frame.pts is None:  # broken streams: one nominal step after the last
            frame.pts = self._last_pts + max(1, round(1 / (self.video.rate * frame.time_base)))
        shape = (frame.width, frame.height, frame.format.name)
        if self._graph is None or shape != self._shape:
            if self._graph is not None:
                self._graph.push(None)
                yield from self._pull()
            self._graph, self._shape = self._build(frame), shape
        self._graph.push(frame)
        yield from self._pull()

    def _pull(self) -> Iterator[Any]:
        assert self._graph is not None
        while True:
            try:
                yield self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return

    def _build(self, frame: Any) -> av.filter.Graph:
        """buffer -> [fps] -> [turn] -> scale -> yuv420p, for frames of this shape."""
        self.size = self.size if self.frames else target_size(self.video.displayed, self.encoding)
        graph = av.filter.Graph()
        chain = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name,
                                  time_base=frame.time_base)]
        if self.encoding.max_fps and self.video.rate > self.encoding.max_fps:
            chain.append(graph.add("fps", f"{Fraction(self.encoding.max_fps).limit_denominator(1001)}"))
        turn, how = _TURN.get(self.video.rotation, ("", ""))
        chain += [graph.add(name, how) if how else graph.add(name) for name in turn.split(",") if name]
        width, height = self.size
        chain.append(graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd+bitexact:out_range=tv"))
        chain += [graph.add("format", "yuv420p"), graph.add("setsar", "1"), graph.add("buffersink")]
        for before, after in itertools.pairwise(chain):
            before.link_to(after)
        graph.configure()
        return graph

    def _encode(self, frame: Any) -> None:
        if self._stream is None:
            self._stream = self._open(frame)
        if self._first_pts is None:
            self._first_pts = frame.pts
        frame.pts = self._last_pts = max(frame.pts - self._first_pts, self._last_pts + 1)
        frame.pict_type = 0  # the encoder's choice, not the source's
        self.frames += 1
        self._container.mux(self._stream.encode(frame))

    def _open(self, frame: Any) -> Any:
        encoding = self.encoding
        interval = str(encoding.keyframe_interval)
        rate = min(self.video.rate, Fraction(240))
        if encoding.max_fps:
            rate = min(rate, Fraction(encoding.max_fps).limit_denominator(1001))
        stream = self._container.add_stream("libx264", rate=rate, options={
            "preset": encoding.preset, "crf": str(encoding.crf), "tune": "fastdecode", "threads": "1",
            "g": interval, "keyint_min": interval, "sc_threshold": "0", **STABLE_CODE})
        context = stream.codec_context
        context.thread_count = 1
        context.width, context.height = self.size
        context.pix_fmt = "yuv420p"
        context.time_base = frame.time_base
        context.color_range = 1  # limited, as the scaler makes it
        source = self.video.stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = (
            source.colorspace, source.color_primaries, source.color_trc)
        return stream
