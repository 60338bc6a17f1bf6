"""A box of a clip's frames as the planes that the video has, cut out and nothing else: the device resizes them.

That takes a tenth of the time of resizing here. What is not 8 bit 4:2:0 or turned, and boxes that would be more bytes than
the RGB that they become, are resized here all the same.

Shapes: T frames; a clip is uint8 [T, bytes of a frame]: its planes Y, U and V one after the other, as in
`decode.decode_views`, but of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from vswin_dist.data.video.crop_resize import Box, pixels_of
from vswin_dist.video import BT601, Orientation, VideoInfo, has_full_range, matrix_of, orientation

FORMATS = ("yuv420p", "yuvj420p")


@dataclass(frozen=True, slots=True)
class Crop:
    """What the planes of one clip are. Lengths in pixels; matrix as the colorspace filter calls it.

    chroma_top, chroma_left: the centre of the first chroma sample, in pixels of luma from the crop's corner.
    flip: whether what is made of them is mirrored.
    """

    height: int
    width: int
    chroma_height: int
    chroma_width: int
    chroma_top: float
    chroma_left: float
    matrix: str = BT601
    full_range: bool = False
    flip: bool = False

    @property
    def bytes(self) -> int:
        """Of one frame."""
        return self.height * self.width + 2 * self.chroma_height * self.chroma_width

    def planes(self, clip: Any) -> list[Any]:
        """Y, U, V of an array or tensor [T, bytes], each [T, height, width] in the same memory."""
        luma, chroma = self.height * self.width, self.chroma_height * self.chroma_width
        parts = clip[:, :luma], clip[:, luma : luma + chroma], clip[:, luma + chroma :]
        sides = (self.height, self.width), *[(self.chroma_height, self.chroma_width)] * 2
        return [part.reshape(len(clip), *side) for part, side in zip(parts, sides, strict=True)]


def resized(size: int, flip: bool) -> Crop:
    """Describe planes that were resized to `size` as `decode.decode_views` does: BT.601 of limited range, chroma centred."""
    return Crop(size, size, size // 2, size // 2, 1.0, 1.0, flip=flip)


class Changed(Exception):
    """A frame is of another kind than those before it."""


class Cut:
    """Where the planes of a box are in frames of one kind.

    Args:
        kind: theirs.
        corners: (top, left) of each plane.
    """

    def __init__(self, crop: Crop, kind: tuple[Any, ...], corners: Sequence[tuple[int, int]]) -> None:
        self.crop, self._kind, self._corners = crop, kind, corners
        sides = (crop.chroma_height, crop.chroma_width)
        self._sides = ((crop.height, crop.width), sides, sides)

    def __call__(self, frame: av.VideoFrame) -> list[NDArray[np.uint8]]:
        """Y, U, V, as views of the frame's memory.

        Raises:
            Changed: see there.
        """
        if _kind_of(frame) != self._kind:
            raise Changed
        return [
            np.ndarray(sides, np.uint8, p, top * p.line_size + left, (p.line_size, 1))  # type: ignore[call-overload]
            for p, (top, left), sides in zip(frame.planes, self._corners, self._sides, strict=True)
        ]


def _kind_of(frame: av.VideoFrame) -> tuple[Any, ...]:
    """Return what must be the same in all frames of a clip that is cut."""
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range


def cut_of(frame: av.VideoFrame, box: Box, video: VideoInfo, most: int, flip: bool) -> Cut | None:
    """Find where `box` of frames such as `frame` is; None where it must be resized first.

    A crop that begins at an odd pixel begins with the chroma sample of the pixel before it. Chroma lies at the left, as in
    MPEG-2 to AV1, between two lines.

    Args:
        most: bytes of a frame beyond which it is resized.
    """
    if frame.format.name not in FORMATS or orientation(frame) != Orientation():
        return None
    top, left, height, width = pixels_of(frame, box, video, Orientation())
    chroma_top, chroma_left = top // 2, left // 2
    crop = Crop(
        height,
        width,
        (top + height + 1) // 2 - chroma_top,
        (left + width + 1) // 2 - chroma_left,
        1.0 - top % 2,
        0.5 - left % 2,
        matrix_of(frame),
        has_full_range(frame),
        flip,
    )
    corners = (chroma_top, chroma_left)
    return Cut(crop, _kind_of(frame), ((top, left), corners, corners)) if crop.bytes <= most else None
