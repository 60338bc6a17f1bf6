"""Stretches: the seconds of a longer film that a row of an annotation means."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from vswin_dist.video import Video

ROUNDING = Fraction(1, 2000)  # seconds by which a frame's time may be off: Matroska counts in milliseconds
BEYOND = 1.0  # seconds after the end that are still decoded, for frames that are not in order
ALIKE = 0.1  # fraction of a row's length by which the file of that stretch alone may differ from it
CLOSE = 0.05  # fraction of a stretch's frames that a file which is not cut may have beside them
_TIMES = re.compile(r"_(\d{6})_(\d{6})$")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Seconds `start` to `end` (exclusive) of a film; `is_file`: by its name, the file holds them alone."""

    start: float
    end: float = math.inf
    is_file: bool = False

    @property
    def length(self) -> float:
        """Seconds from start to end."""
        return self.end - self.start

    def __str__(self) -> str:
        """Write it as a media fragment does: `10,20`, `10` where it has no end."""
        return _text(self.start) + (f",{_text(self.end)}" if self.end < math.inf else "")

    def note(self, duration: float, cut: bool) -> str:
        """Say what is odd about a kept video of `duration` seconds, which was `cut` or is the file: "" for nothing."""
        if self.end == math.inf:
            return ""
        meant = f"its row means {_text(self.length)} s ({self})"
        if duration > 1.5 * self.length and duration > self.length + 0.5:
            return f"lasts {duration:.1f} s, {meant}"
        if cut and duration < self.length / 2:
            return f"lasts only {duration:.1f} s, {meant}"
        if not cut and not self.is_file and self.start > 0:
            return f"lasts {duration:.1f} s and {meant}: taken for that stretch itself"
        return ""


def _text(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


@functools.lru_cache(1 << 16)  # few different ones in a set of ten-second clips
def parse_stretch(start: str, end: str) -> Stretch | None:
    """Read the times of a row: seconds, or hours, minutes and seconds with colons. No text is the film's start or end.

    Returns:
        None for the whole film.

    Raises:
        ValueError: they are no times, or the end is not after the start.
    """
    stretch = Stretch(_seconds(start, 0.0), _seconds(end, math.inf))
    if not stretch.start < stretch.end:
        raise ValueError(f"the end {end} is not after the start {start}")
    return stretch if stretch != Stretch(0.0) else None


def _seconds(text: str, default: float) -> float:
    total = 0.0
    for part in text.split(":") if text else []:
        value = float(part)
        if not 0 <= value < 1e8 or text.count(":") > 2:
            raise ValueError(f"{text} is no time")
        total = 60 * total + value
    return total if text else default


def name_holds(stem: str, stretch: Stretch) -> bool:
    """Say whether a file's name ends in the times of `stretch` (`ID_000010_000020`): the file is that stretch."""
    found = _TIMES.search(stem)
    if not found or stretch.end == math.inf:
        return False
    return [int(number) for number in found.groups()] == [int(stretch.start), int(stretch.end)]


@functools.lru_cache(1 << 16)
def as_file(stretch: Stretch) -> Stretch:
    """Give the same stretch, for a file that holds it alone."""
    return replace(stretch, is_file=True)


class Window:
    """Tells the frames of a film that lie within a stretch from the others, and counts both.

    Times count from the film's start, as players show them. A file that ends before the stretch does, and lasts as long
    as it, is the stretch.
    """

    def __init__(self, stretch: Stretch, video: Video) -> None:
        self.stretch = stretch
        self.inside = self.outside = 0
        self.last = 0.0  # time of the latest frame, seconds
        self._rate = video.rate
        self._has_dts_alone = "avi" in video.container.format.name.split(",")
        self._origin = None if self._has_dts_alone else Fraction(video.container.start_time or 0, 10**6)
        duration = (video.container.duration or 0) / 1e6
        alone = duration < stretch.end < math.inf and abs(duration - stretch.length) <= ALIKE * stretch.length
        self.cuts = not stretch.is_file and not alone

    def holds(self, frame: Any) -> bool:
        """Say whether `frame` is part of the stretch."""
        if not self.cuts:
            return True
        time = self._time(frame)
        self.last = float(time)
        early, late = time < Fraction(self.stretch.start) - ROUNDING, self.last >= self.stretch.end - ROUNDING
        self.inside += not early and not late
        self.outside += early or late
        return not early and not late

    def _time(self, frame: Any) -> Fraction:
        """Give the seconds from the film's start: in AVI from its first frame, since it knows no order but the decoder's."""
        stamp = frame.dts if self._has_dts_alone else frame.pts
        if stamp is None:
            return (self.inside + self.outside) * (frame.duration * frame.time_base if frame.duration else 1 / self._rate)
        if self._origin is None:
            self._origin = stamp * frame.time_base
        return Fraction(stamp * frame.time_base - self._origin)

    @property
    def passed(self) -> bool:
        """Whether the film has come well beyond the stretch."""
        return self.cuts and self.last > self.stretch.end + BEYOND

    @property
    def is_close(self) -> bool:
        """Whether the whole film is as good as the stretch."""
        return self.outside <= CLOSE * self.inside
