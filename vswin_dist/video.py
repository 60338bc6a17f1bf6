"""What a video file is: its first real stream, the size and the orientation it is displayed in, and its colours.

The preparation of datasets and the decoding of clips read videos through this module alone, so that what the one says of a
file holds for the other.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import av
import av.container
import av.error
import av.filter
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition

Reason = Literal["unreadable", "no_video_stream", "unknown_codec"]

LIMITED_RANGE, FULL_RANGE = 1, 2  # AVColorRange
BT601 = "smpte170m"
# AVColorSpace -> the colorspace filter's name, of matrices that differ from BT.601
_MATRICES = {1: "bt709", 4: "fcc", 7: "smpte240m", 9: "bt2020nc", 10: "bt2020nc"}
# mirrored, inverted -> FFmpeg's name of the transposition that does the same afterwards
_TRANSPOSED = {
    (False, False): "cclock_flip",
    (True, False): "clock",
    (False, True): "cclock",
    (True, True): "clock_flip",
}
_UNKNOWN_SIDE_DATA = range(len(SideData), len(SideData) + 16)  # FFmpeg's numbers of what is newer than PyAV


class Orientation(NamedTuple):
    """How a stored picture is displayed: one of eight ways, made of three steps in this order."""

    transposed: bool = False  # rows become columns, the first row the first column
    mirrored: bool = False  # left becomes right
    inverted: bool = False  # top becomes bottom

    def filters(self) -> tuple[tuple[str, str], ...]:
        """Give FFmpeg's filters, each with its arguments, that make the displayed picture of a stored one."""
        if self.transposed:
            return (("transpose", _TRANSPOSED[self.mirrored, self.inverted]),)
        return (("hflip", ""),) * self.mirrored + (("vflip", ""),) * self.inverted


class VideoError(Exception):
    """A file without a video that can be decoded.

    Args:
        reason: what it lacks.
        message: the same in words, for an error.
        detail: what is there instead, for a report.
    """

    def __init__(self, reason: Reason, message: str, detail: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What must be known of a video before any of it is decoded, as a manifest states it."""

    frames: int  # that a full decode gives
    width: int  # pixels as displayed (rotation and pixel shape applied)
    height: int
    name: object  # what to call it in an error: its text
    earlier_colours: bool = False  # it is to be read as before manifests had `colours`


class Video:
    """A video file in memory, open for decoding in this thread alone.

    `stream` is the first one that is not a cover picture.
    """

    def __init__(self, data: bytes, buffer_size: int = 1 << 15) -> None:
        """Open the container.

        Args:
            data: the file, in any container that FFmpeg reads.
            buffer_size: bytes that are read at once.

        Raises:
            VideoError: it cannot be opened, has no video stream, or none that FFmpeg has a decoder for.
        """
        try:
            self.container = av.open(io.BytesIO(data), metadata_errors="ignore", buffer_size=buffer_size)
        except (av.error.FFmpegError, ValueError) as error:
            detail = message_of(error) if data else "the file is empty"
            raise VideoError("unreadable", str(error), detail) from error
        try:
            self.stream = _first_stream(self.container)
        except VideoError:
            self.container.close()
            raise
        self.stream.thread_type = "NONE"
        self.stream.codec_context.thread_count = 1

    def close(self) -> None:
        """Give the decoder back."""
        self.container.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rate(self) -> Fraction:
        """The nominal frame rate, 25 where the container has none that can be."""
        for rate in (self.stream.average_rate, self.stream.base_rate, self.stream.guessed_rate):
            if rate and Fraction(1, 10) <= rate <= 1000:
                return Fraction(rate)
        return Fraction(25)

    @contextlib.contextmanager
    def packets(self, all_streams: bool = False) -> Iterator[Iterator[Any]]:
        """Give the packets of the video's stream, or of `all_streams`, ending with empty ones.

        The reading is closed in any case: PyAV 18 leaks a packet where it is dropped half-way, and each of them, though
        small, pins a place of the heap.
        """
        packets: Any = self.container.demux(*(() if all_streams else (self.stream,)))
        with contextlib.closing(packets):
            yield packets

    def frames(self) -> Iterator[av.VideoFrame]:
        """Decode the frames in display order; the first packet that does not decode raises FFmpeg's error."""
        with self.packets() as packets:
            for packet in packets:
                yield from packet.decode()

    def displayed_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Give the width and height, pixels, that `frame` is displayed in: with square pixels and turned upright."""
        ratio = float(self.stream.sample_aspect_ratio or 1)
        width, height = max(1, round(frame.width * ratio)), frame.height
        return (height, width) if orientation(frame).transposed else (width, height)


def _first_stream(container: av.container.InputContainer) -> Any:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = (
            ", ".join(sorted({"a cover picture" if s.type == "video" else s.type for s in container.streams})) or "nothing"
        )
        raise VideoError("no_video_stream", "it has no video stream", f"the container holds {kinds}")
    if streams[0].codec_context is None:
        raise VideoError("unknown_codec", "its codec is unknown", "FFmpeg has no decoder for it")
    return streams[0]


def message_of(error: Exception) -> str:
    """Take FFmpeg's own words from an error, without its number and the file's name."""
    return str(getattr(error, "strerror", None) or error)


def orientation(frame: av.VideoFrame) -> Orientation:
    """Read how `frame` is displayed from its display matrix; an angle between is taken for the nearest quarter turn."""
    try:
        data = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:  # PyAV gives nothing of a frame that also carries what it does not know, such as EXIF
        data = _with_known_side_data(frame).side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return Orientation()
    # shown at x = a * column + c * row, y = b * column + d * row
    a, b, _, c, d = memoryview(data).cast("i")[:5]  # type: ignore[arg-type]
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    return Orientation(transposed, (c if transposed else a) < 0, (b if transposed else d) < 0)


def _with_known_side_data(frame: av.VideoFrame) -> av.VideoFrame:
    graph = av.filter.Graph()
    size = {"width": frame.width, "height": frame.height, "format": frame.format.name}
    deletions = (graph.add("sidedata", f"mode=delete:type={number}") for number in _UNKNOWN_SIDE_DATA)
    graph.link_nodes(graph.add_buffer(**size, time_base=Fraction(1, 1000)), *deletions, graph.add("buffersink"))
    graph.configure()
    graph.push(frame)
    return graph.pull()  # type: ignore[return-value]


def matrix_of(frame: av.VideoFrame) -> str:
    """Name the matrix of `frame` as the colorspace filter does; `BT601` where it has none of the others."""
    return _MATRICES.get(frame.colorspace, BT601)


def stores_yuv(frame: av.VideoFrame) -> bool:
    """Say whether `frame` has planes of luma and chroma, to which its matrix and range apply: not RGB, a palette or grey.

    Grey has full range whatever it is tagged, as everywhere in FFmpeg.
    """
    pixels = frame.format
    return len(pixels.components) >= 3 and not pixels.is_rgb and not pixels.name.startswith("xyz")


def has_full_range(frame: av.VideoFrame) -> bool:
    """Say whether black and white of `frame` are 0 and 255 rather than 16 and 235."""
    return bool(frame.color_range == FULL_RANGE or frame.format.name.startswith("yuvj"))


def jpeg(frame: av.VideoFrame, width: int) -> str:
    """Encode a frame, made `width` pixels wide, as the `data:` URL of a JPEG."""
    height = max(2, round(frame.height * width / frame.width / 2) * 2)
    small = frame.reformat(width, height, "yuvj420p")
    small.pts, small.pict_type = 0, 0  # type: ignore[assignment]
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"  # type: ignore[attr-defined]
    encoder.options = {"qscale": "5"}
    encoder.thread_count = 1
    packets = [*encoder.encode(small), *encoder.encode(None)]  # type: ignore[attr-defined]
    return "data:image/jpeg;base64," + base64.b64encode(b"".join(bytes(p) for p in packets)).decode()
