"""Decode one video completely and judge it.

The decision table; the first line that applies is the verdict:

| verdict          | when                                                                                          |
|------------------|-----------------------------------------------------------------------------------------------|
| missing_video    | the source names it, no file is there                                                         |
| unreadable       | no container that FFmpeg knows, damaged beyond opening, or no access to the file              |
| too_large        | the file has more than 1 GiB (it is held in memory)                                           |
| no_video_stream  | a container without a video stream (audio, subtitles, cover pictures alone)                   |
| unknown_codec    | the bundled FFmpeg has no decoder for it                                                      |
| truncated        | the last packet is cut, or the data ends before 90% of what the container's header declares   |
| no_frames        | not one frame could be decoded                                                                |
| decode_errors    | more than `max_bad` of the frames are lost or damaged                                         |
| too_short        | fewer than `min_frames` frames                                                                |
| too_small        | the short side, as displayed, has fewer than `min_side` pixels                                |
| encode_failed    | the encoder refused what was decoded                                                          |
| crashed          | worker processes died five times while on it                                                  |
| duplicate        | the same bytes came before in the dataset's order                                             |
| kept             | otherwise                                                                                     |
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.error

from data_prep.settings import Encoding

KEPT = "kept"
MAX_BYTES = 1 << 30
ENOUGH = 0.9  # share of the declared frames or duration below which the data counts as cut off
# Containers whose header states a duration that was written, not guessed from the bit rate.
_DECLARES_DURATION = ("mov", "matroska")


class Rejected(Exception):
    """A verdict other than kept."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass
class Facts:
    """What was seen while decoding. Sizes in pixels as displayed (rotation and pixel shape applied)."""

    frames: int = 0
    width: int = 0
    height: int = 0
    fps: float = 0.0
    duration: float = 0.0  # seconds
    extension: str = ""
    bad: int = 0  # frames damaged or lost to decode errors


class Video:
    """One video in memory: open it, go once through `frames`, then ask for `facts`."""

    def __init__(self, data: bytes, limits: Encoding, name: str = "") -> None:
        """Open the container. Raises Rejected where it cannot be decoded at all."""
        self.limits = limits
        try:
            self.container = av.open(io.BytesIO(data), metadata_errors="ignore", buffer_size=1 << 18)
        except (av.error.FFmpegError, ValueError) as error:
            raise Rejected("unreadable", _reason(error) if data else "the file is empty") from error
        self.stream = self._choose_stream()
        self.stream.thread_type = "NONE"
        self.stream.codec_context.thread_count = 1
        self.name = name
        self.rotation = 0  # degrees counterclockwise, as FFmpeg gives it
        self._frames = self._bad = self._packets = 0
        self._first: float | None = None
        self._last = 0.0
        self._size = (0, 0)
        self._reached = 0.0  # end of the latest packet of any stream, in seconds
        self._cut = False

    def close(self) -> None:
        """Give the decoder back."""
        self.container.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _choose_stream(self) -> Any:
        streams = [s for s in self.container.streams.video if "attached_pic" not in str(s.disposition).lower()]
        if not streams:
            kinds = ", ".join(sorted({s.type for s in self.container.streams})) or "nothing"
            raise Rejected("no_video_stream", f"the container holds {kinds}")
        if streams[0].codec_context is None:
            raise Rejected("unknown_codec", "FFmpeg has no decoder for it")
        return streams[0]

    @property
    def rate(self) -> Fraction:
        """The nominal frame rate, 25 where the container has none that can be."""
        for rate in (self.stream.average_rate, self.stream.base_rate, self.stream.guessed_rate):
            if rate and Fraction(1, 10) <= rate <= 1000:
                return Fraction(rate)
        return Fraction(25)

    def frames(self) -> Iterator[Any]:
        """Every frame that decodes, in display order. Raises Rejected only where the codec cannot be started."""
        packets = self.container.demux()
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.error.FFmpegError as error:
                if self._packets == 0:
                    raise Rejected("unreadable", _reason(error)) from error
                self._cut = True
                return
            self._note(packet)
            if packet.stream.index != self.stream.index:
                continue
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                self._bad += 1
                continue
            for frame in decoded:
                self._see(frame)
                yield frame

    def _note(self, packet: Any) -> None:
        if packet.size == 0:  # the flush at the end
            return
        if packet.stream.index == self.stream.index:
            self._packets += 1
            self._cut = bool(packet.is_corrupt)
        if packet.pts is not None and packet.time_base:
            start = min(0, packet.stream.start_time or 0)  # a late start counts: Matroska's duration includes it
            end = float((packet.pts - start + (packet.duration or 0)) * packet.time_base)
            self._reached = max(self._reached, end)

    def _see(self, frame: Any) -> None:
        if self._frames == 0:
            self.rotation = round(frame.rotation / 90) * 90 % 360
            ratio = self.stream.sample_aspect_ratio or 1
            width, height = max(1, round(frame.width * float(ratio))), frame.height
            self._size = (height, width) if self.rotation in (90, 270) else (width, height)
        self._frames += 1
        self._bad += bool(frame.is_corrupt)
        if frame.time is not None:
            self._first = frame.time if self._first is None else self._first
            self._last = max(self._last, frame.time)

    @property
    def displayed(self) -> tuple[int, int]:
        """Width and height as displayed; known once the first frame has been seen."""
        return self._size

    def facts(self) -> Facts:
        """The verdict, after `frames` has run to its end. Raises Rejected with the first that applies."""
        self._check_cut()
        if self._frames == 0:
            raise Rejected("no_frames", f"{self._packets} packets, none of them decodes")
        share = self._bad / (self._frames + self._bad)
        if share > self.limits.max_bad:
            raise Rejected("decode_errors", f"{self._bad} frames damaged or lost, {self._frames} decoded; "
                                            f"at most {self.limits.max_bad:.0%} is let pass")
        if self._frames < self.limits.min_frames:
            raise Rejected("too_short", f"{self._frames} frames; at least {self.limits.min_frames} are asked for")
        if min(self._size) < self.limits.min_side:
            raise Rejected("too_small", f"{self._size[0]}x{self._size[1]} pixels; the short side must have "
                                        f"{self.limits.min_side}")
        span = self._last - (self._first or 0.0)  # from the first frame's time to the last's
        fps = (self._frames - 1) / span if span > 0 else float(self.rate)
        return Facts(self._frames, *self._size, round(fps, 3), round(self._frames / fps, 4),
                     extension(self.container.format.name, self.name), self._bad)

    def _check_cut(self) -> None:
        seen = f"{self._frames} frames and {self._packets} packets seen"
        if self._cut:
            raise Rejected("truncated", f"the data breaks off within a packet; {seen}")
        names = self.container.format.name.split(",")
        if "avi" in names and 0 < self._packets < ENOUGH * self.stream.frames:
            raise Rejected("truncated", f"the header declares {self.stream.frames} frames; {seen}")
        declared = (self.container.duration or 0) / av.time_base
        if any(n in names for n in _DECLARES_DURATION) and self._reached < ENOUGH * declared - 0.1:
            raise Rejected("truncated", f"the header declares {declared:.2f} s, the data ends at "
                                        f"{self._reached:.2f} s; {seen}")


_EXTENSIONS = {"mov": "mp4", "matroska": "mkv", "mpeg": "mpg", "mpegts": "ts", "asf": "wmv", "ogg": "ogv"}
_SAME_CONTAINER = {"mov": {"mp4", "mov", "m4v", "3gp", "3g2", "mj2"}, "matroska": {"mkv", "webm"},
                   "mpeg": {"mpg", "mpeg", "vob"}, "mpegts": {"ts", "mts", "m2ts"}}


def extension(container: str, name: str) -> str:
    """The extension of a container (FFmpeg's name of it), the file's own where it is one of that container."""
    family = container.split(",")[0]
    own = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    return own if own in _SAME_CONTAINER.get(family, ()) else _EXTENSIONS.get(family, family)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
