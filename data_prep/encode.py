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

from data_prep.probe import KEPT, Examination, Facts, Rejected, pace
from data_prep.settings import Encoding
from data_prep.stretch import Stretch
from vswin_dist.video import BT601, LIMITED_RANGE, has_full_range, matrix_of, stores_yuv

# x264's AVX-512 code was seen to give now and then other bytes for the same frames (3 encodings in 100, AMD EPYC,
# libavcodec 62.28); AVX2 and below never did. Other processors take x264's own choice.
STABLE_CODE = {"x264-params": "asm=avx2"} if platform.machine() in ("x86_64", "AMD64") else {}

EARLY = 0.1  # of the frame interval of a capped rate
# AVColorSpace
_UNTAGGED, _SMPTE170M = 2, 6
_NO_MATRIX = {0, 3}  # RGB, reserved: nothing that planes of luma and chroma can have


@dataclass
class Outcome:
    """What became of one video. The fields after `detail` hold for a kept one and describe the bytes to be packed."""

    verdict: str
    detail: str = ""  # of a kept one, what people should know of it
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
        """Plain JSON values; `Outcome(**d)` makes it again."""
        return asdict(self)


def process(data: bytes, encoding: Encoding, name: str, stretch: Stretch | None = None) -> tuple[Outcome, bytes]:
    """Verify `data`, or a `stretch` of it, and make the bytes to pack (the same object where they are kept).

    `name` is the file's.
    """
    content = hashlib.sha256(data).hexdigest()[:32]
    make = transcode if encoding.transcodes else _keep
    try:
        facts, made = make(data, encoding, name, stretch)
    except Rejected as rejected:
        return Outcome(rejected.reason, rejected.detail, content), b""
    if facts.is_cut:  # other stretches of the film are no duplicates
        content = hashlib.sha256(f"{content} {stretch}".encode()).hexdigest()[:32]
    return Outcome(
        KEPT,
        stretch.note(facts.duration, facts.is_cut) if stretch else "",
        content,
        facts.extension,
        len(made),
        zlib.crc32(made),
        facts.frames,
        facts.fps,
        facts.duration,
        facts.width,
        facts.height,
    ), made


def _keep(data: bytes, encoding: Encoding, name: str, stretch: Stretch | None) -> tuple[Facts, bytes]:
    return verify(data, encoding, name, stretch), data


def verify(data: bytes, encoding: Encoding, name: str = "", stretch: Stretch | None = None) -> Facts:
    """Decode everything and give the facts.

    Raises:
        Rejected: the video is not to be kept.
    """
    with Examination(data, encoding, name, stretch) as examination:
        for _ in examination.frames():
            pass
        return examination.facts()


def target_size(displayed: tuple[int, int], encoding: Encoding) -> tuple[int, int]:
    """Width and height of the encoded video: the short side as asked for, never larger than it was, both even."""
    scale = 1.0
    if encoding.profile == "train":
        scale = min(1.0, encoding.short_side / min(displayed))
    width, height = (max(2, min(2 * round(side * scale / 2), side // 2 * 2)) for side in displayed)
    return width, height


def transcode(data: bytes, encoding: Encoding, name: str = "", stretch: Stretch | None = None) -> tuple[Facts, bytes]:
    """Decode everything once, encoding it or a `stretch` of it on the way; the facts are those of the encoded video.

    Raises:
        Rejected: the video is not to be kept.
    """
    with Examination(data, encoding, name, stretch) as examination:
        writer = _Writer(examination, encoding)
        failure: av.error.FFmpegError | None = None
        for frame in examination.frames():
            if failure is None:
                try:
                    writer.write(frame)
                except av.error.FFmpegError as error:
                    failure = error  # decode on: the verdict on the source comes first
        facts = examination.facts()
        try:
            made = writer.finish()
        except av.error.FFmpegError as error:
            failure = failure or error
        if failure is not None:
            raise Rejected("encode_failed", str(failure)) from failure
        facts.width, facts.height = writer.size
        facts.extension = "mp4"
        if writer.frames < facts.frames:  # of a source with enough of them
            if writer.frames < encoding.min_frames:
                raise Rejected(
                    "too_short",
                    f"{writer.frames} of {facts.frames} frames are left at {encoding.max_fps:g} a second; "
                    f"at least {encoding.min_frames} are asked for",
                )
            facts.frames = writer.frames
            facts.fps, facts.duration = pace(writer.frames, writer.span, min(facts.fps, encoding.max_fps or facts.fps))
        return facts, made


class RateCap:
    """Tells which frames to drop so that no more than `fps` a second are left, on the whole and in any stretch.

    A frame is dropped that follows the last one left sooner than a frame of that rate lasts. It may be early by a tenth
    of that, which the next must make up for: times are rounded, and 30 a second are a little more than 29.97.
    """

    def __init__(self, fps: float) -> None:
        self._step = 1 / fps
        self._due: float | None = None

    def drops(self, time: float) -> bool:
        """Say whether to drop the frame at `time`, seconds, later than those asked about before."""
        if self._due is not None and time < self._due - EARLY * self._step:
            return True
        self._due = (time if self._due is None else max(time, self._due)) + self._step
        return False


class _Writer:
    """Scales, turns and encodes frames into an mp4 in memory."""

    def __init__(self, examination: Examination, encoding: Encoding) -> None:
        self.examination = examination
        self.video = examination.video
        self.encoding = encoding
        self.size = (0, 0)
        self.frames = 0
        self.span = 0.0  # seconds from the first encoded frame to the last
        self._cap = RateCap(encoding.max_fps) if encoding.max_fps else None
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp4")
        self._stream: Any = None
        self._graph: av.filter.Graph | None = None
        self._shape: tuple[Any, ...] = ()
        self._matrix = BT601  # of the encoded video, as the colorspace filter names it
        self._tags = (0, 0, 0)  # of the encoded video: matrix, primaries, transfer, by FFmpeg's numbers
        self._last_pts = -1
        self._first_pts: int | None = None

    def write(self, frame: Any) -> None:
        """Encode one decoded frame, where it does not follow the last one too soon."""
        if self._cap and self._cap.drops(frame.time):
            return
        for ready in self._scaled(frame):
            self._encode(ready)

    def finish(self) -> bytes:
        """Return the whole file's bytes."""
        if self._graph is not None:
            self._graph.push(None)
            for frame in self._pull():
                self._encode(frame)
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._file.getvalue()

    def _scaled(self, frame: Any) -> Iterator[Any]:
        shape = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
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
        """buffer -> [turn] -> scale -> yuv420p, for frames of this shape."""
        self.size = self.size if self.frames else target_size(self.examination.displayed, self.encoding)
        graph = av.filter.Graph()
        chain = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base)
        ]
        chain += [graph.add(name, how or None) for name, how in self.examination.orientation.filters()]
        chain += [graph.add(name, how) for name, how in self._to_planes(frame)]
        chain += [graph.add("setsar", "1"), graph.add("buffersink")]
        for before, after in itertools.pairwise(chain):
            before.link_to(after)
        graph.configure()
        return graph

    def _to_planes(self, frame: Any) -> list[tuple[str, str]]:
        """Return the steps to 4:2:0 of 8 bits and limited range, with the matrix that the encoded video is tagged with.

        Planes of 8 bits and limited range are scaled as they are, under their tag. What is computed anew becomes BT.601,
        which the model takes as it is. The scaler is told one matrix and one range for both sides; the colorspace filter
        converts, since it rounds, where the scaler is off by up to two steps.
        """
        yuv = stores_yuv(frame)
        matrix, full = (matrix_of(frame), has_full_range(frame)) if yuv else (BT601, True)
        deep = not yuv or max(c.bits for c in frame.format.components) > 8
        if not self.frames:
            anew = not yuv or (matrix != BT601 and (full or deep))
            self._matrix = BT601 if anew else matrix
            tag = _SMPTE170M if anew else _UNTAGGED if frame.colorspace in _NO_MATRIX else frame.colorspace
            self._tags = tag, frame.color_primaries, frame.color_trc
        width, height = self.size
        levels = "pc" if full else "tv"
        steps = [
            (
                "scale",
                f"{width}:{height}:flags=bicubic+accurate_rnd+bitexact:sws_dither=none:in_color_matrix=bt601:"
                f"out_color_matrix=bt601:in_range={levels}:out_range={levels}",
            ),
            ("format", "yuv420p12" if deep else "yuv420p"),
        ]
        if full or deep or matrix != self._matrix:
            conversion = f"ispace={matrix}:irange={levels}:space={self._matrix}:range=tv"
            steps.append(("colorspace", f"all={BT601}:iall={BT601}:{conversion}:fast=1:format=yuv420p"))
        return steps

    def _encode(self, frame: Any) -> None:
        if self._stream is None:
            self._stream = self._open(frame)
        if self._first_pts is None:
            self._first_pts = frame.pts
        frame.pts = self._last_pts = max(frame.pts - self._first_pts, self._last_pts + 1)
        frame.pict_type = 0  # the encoder's choice, not the source's
        self.frames += 1
        self.span = frame.time
        self._container.mux(self._stream.encode(frame))

    def _open(self, frame: Any) -> Any:
        encoding = self.encoding
        interval = str(encoding.keyframe_interval)
        rate = min(self.video.rate, Fraction(240))
        if encoding.max_fps:
            rate = min(rate, Fraction(encoding.max_fps).limit_denominator(1001))
        stream = self._container.add_stream(
            "libx264",
            rate=rate,
            options={
                "preset": encoding.preset,
                "crf": str(encoding.crf),
                "tune": "fastdecode",
                "threads": "1",
                "g": interval,
                "keyint_min": interval,
                "sc_threshold": "0",
                **STABLE_CODE,
            },
        )
        context = stream.codec_context
        context.thread_count = 1
        context.width, context.height = self.size
        context.pix_fmt = "yuv420p"
        context.time_base = frame.time_base
        context.color_range = LIMITED_RANGE  # as the scaler makes it
        context.colorspace, context.color_primaries, context.color_trc = self._tags
        return stream
