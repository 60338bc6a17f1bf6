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
|                  | and the container's structure (`structure.py`) shows that the file was cut off                |
| no_frames        | not one frame could be decoded                                                                |
| decode_errors    | more than `max_bad` of the frames are lost or damaged                                         |
| outside_film     | not one frame lies within the stretch that the row means                                      |
| not_cut          | the row means a part of the film, and the profile keeps files as they are                     |
| too_short        | fewer than `min_frames` frames, in the source or under the cap of the rate                    |
| too_small        | the short side, as displayed, has fewer than `min_side` pixels                                |
| encode_failed    | the encoder refused what was decoded                                                          |
| crashed          | worker processes died five times while on it, or twice for want of memory                     |
| duplicate        | the same bytes came before in the dataset's order                                             |
| kept             | otherwise                                                                                     |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import av.error

from data_prep.settings import Encoding
from data_prep.stretch import Stretch, Window
from data_prep.structure import breaks_off, loses_packets
from vswin_dist.video import Orientation, Video, VideoError, message_of, orientation

KEPT = "kept"
MAX_BYTES = 1 << 30
ENOUGH = 0.9  # fraction of the declared frames or duration below which the data counts as cut off
CLOCK_SET_BACK = 8  # frames; a lesser step back is disorder, a larger one a join of two recordings
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
    is_cut: bool = False  # it describes a stretch of the file alone


class Examination:
    """The complete decoding of one video: open it, go once through `frames`, then ask for `facts`.

    Of a `stretch` of it, where the encoding cuts: `frames` and `facts` are those of the stretch, and what follows its end
    is read but not decoded.
    """

    def __init__(self, data: bytes, limits: Encoding, name: str = "", stretch: Stretch | None = None) -> None:
        """Open the video.

        Raises:
            Rejected: it cannot be decoded at all.
        """
        self.limits = limits
        try:
            self.video = Video(data, buffer_size=1 << 18)
        except VideoError as error:
            raise Rejected(error.reason, error.detail) from error
        self.name = name
        self.window = Window(stretch, self.video) if stretch else None
        self._data = data
        self.orientation = Orientation()  # of the first frame
        self._frames = self._bad = self._packets = 0
        self._next_pts: int | None = None  # of the clock that frames are given, see `_time`
        self._shift = 0
        self._first: float | None = None
        self._last = 0.0
        self._size = (0, 0)
        self._reached = 0.0  # end of the latest packet of any stream, in seconds
        self._cut = False

    def close(self) -> None:
        """Give the decoder back."""
        self.video.close()

    def __enter__(self) -> Examination:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def frames(self) -> Iterator[Any]:
        """Decode every frame that decodes, in display order, each with a time.

        Raises:
            Rejected: not one packet can be read.
        """
        for packet in self._packets_read():
            self._note(packet)
            if packet.stream.index != self.video.stream.index or self._is_past():
                continue
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                self._bad += 1
                continue
            for frame in decoded:
                self._time(frame)
                if self._is_wanted(frame):
                    self._see(frame)
                    yield frame

    def _is_wanted(self, frame: Any) -> bool:
        """Say whether a frame is part of the video to be made; damage before the first such frame does not count."""
        if self.window is None or self.window.holds(frame) or not self.limits.transcodes:
            return True
        if self._frames == 0:
            self._bad = 0
        return False

    def _is_past(self) -> bool:
        return self.window is not None and self.limits.transcodes and self.window.passed

    def _time(self, frame: Any) -> None:
        """Have a frame without a time follow the last one, and likewise those after a clock that was set back."""
        step = frame.duration or max(1, round(1 / (self.video.rate * frame.time_base)))
        if frame.pts is None:
            frame.pts = self._next_pts or 0
        else:
            if self._next_pts is not None and frame.pts + self._shift < self._next_pts - CLOCK_SET_BACK * step:
                self._shift = self._next_pts - frame.pts
            frame.pts += self._shift
        self._next_pts = frame.pts + step

    def _packets_read(self) -> Iterator[Any]:
        """Yield the packets of all streams, up to the first that cannot be read."""
        with self.video.packets(all_streams=True) as packets:
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    return
                except av.error.FFmpegError as error:
                    if self._packets == 0:
                        raise Rejected("unreadable", message_of(error)) from error
                    self._cut = True
                    return
                yield packet

    def _note(self, packet: Any) -> None:
        if packet.size == 0:  # the flush at the end
            return
        if packet.stream.index == self.video.stream.index:
            self._packets += 1
            self._cut = bool(packet.is_corrupt)
        if packet.pts is not None and packet.time_base:
            start = min(0, packet.stream.start_time or 0)  # a late start counts: Matroska's duration includes it
            end = float((packet.pts - start + (packet.duration or 0)) * packet.time_base)
            self._reached = max(self._reached, end)

    def _see(self, frame: Any) -> None:
        if self._frames == 0:
            self.orientation = orientation(frame)
            self._size = self.video.displayed_size(frame)
        self._frames += 1
        self._bad += bool(frame.is_corrupt)
        self._first = frame.time if self._first is None else self._first
        self._last = max(self._last, frame.time)

    @property
    def displayed(self) -> tuple[int, int]:
        """Width and height as displayed; known once the first frame has been seen."""
        return self._size

    def facts(self) -> Facts:
        """Judge the video, after `frames` has run to its end.

        Raises:
            Rejected: with the first verdict that applies.
        """
        self._check_cut()
        if self._frames == 0 and not (self.window and self.window.outside):
            raise Rejected("no_frames", f"{self._packets} packets, none of them decodes")
        self._check_stretch()
        if self._bad / (self._frames + self._bad) > self.limits.max_bad:
            raise Rejected(
                "decode_errors",
                f"{self._bad} frames damaged or lost, {self._frames} decoded; at most {self.limits.max_bad:.0%} is let pass",
            )
        if self._frames < self.limits.min_frames:
            raise Rejected("too_short", f"{self._frames} frames; at least {self.limits.min_frames} are asked for")
        if min(self._size) < self.limits.min_side:
            raise Rejected(
                "too_small", f"{self._size[0]}x{self._size[1]} pixels; the short side must have {self.limits.min_side}"
            )
        return Facts(
            self._frames,
            *self._size,
            *pace(self._frames, self._last - (self._first or 0.0), float(self.video.rate)),
            extension(self.video.container.format.name, self.name),
            self._bad,
            self.window is not None and self.window.cuts and self.limits.transcodes,
        )

    def _check_stretch(self) -> None:
        if self.window is None or not self.window.cuts:
            return
        stretch = self.window.stretch
        if self.window.inside == 0:
            raise Rejected(
                "outside_film", f"the row means {stretch} s of a film whose last frame is at {self.window.last:.2f} s"
            )
        if not self.limits.transcodes and not self.window.is_close:
            raise Rejected(
                "not_cut",
                f"the row means {stretch} s of a film that ends at {self.window.last:.2f} s, and the profile "
                f"{self.limits.profile} keeps files as they are; take --profile train or archive, or cut the files before",
            )

    def _check_cut(self) -> None:
        seen = f"{self._frames} frames and {self._packets} packets seen"
        if self._cut:
            raise Rejected("truncated", f"the data breaks off within a packet; {seen}")
        container, stream = self.video.container, self.video.stream
        if evidence := loses_packets(self._data, container.format.name):
            raise Rejected("truncated", f"the data breaks off within a packet, {evidence}; {seen}")
        names = container.format.name.split(",")
        declared = (container.duration or 0) / av.time_base
        if "avi" in names and 0 < self._packets < ENOUGH * stream.frames:
            lack = f"the header declares {stream.frames} frames"
        elif any(n in names for n in _DECLARES_DURATION) and self._reached < ENOUGH * declared - 0.1:
            lack = f"the header declares {declared:.2f} s, the data ends at {self._reached:.2f} s"
        else:
            return
        indexed = max((entry.pos + entry.size for s in container.streams for entry in s.index_entries), default=0)
        if evidence := breaks_off(self._data, container.format.name, indexed):
            raise Rejected("truncated", f"{lack}, {evidence}; {seen}")


def pace(frames: int, span: float, nominal: float) -> tuple[float, float]:
    """Give the frames per second and the duration in seconds of `frames` whose first and last are `span` seconds apart.

    Args:
        nominal: frames per second of what has no span, such as a single frame.
    """
    fps = (frames - 1) / span if span > 0 else nominal
    return round(fps, 3), round(frames / fps, 4)


_EXTENSIONS = {"mov": "mp4", "matroska": "mkv", "mpeg": "mpg", "mpegts": "ts", "asf": "wmv", "ogg": "ogv"}
_SAME_CONTAINER = {
    "mov": {"mp4", "mov", "m4v", "3gp", "3g2", "mj2"},
    "matroska": {"mkv", "webm"},
    "mpeg": {"mpg", "mpeg", "vob"},
    "mpegts": {"ts", "mts", "m2ts"},
}


def extension(container: str, name: str) -> str:
    """Return the extension of a container (FFmpeg's name of it), the file's own where it is one of that container."""
    family = container.split(",")[0]
    own = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    return own if own in _SAME_CONTAINER.get(family, ()) else _EXTENSIONS.get(family, family)
