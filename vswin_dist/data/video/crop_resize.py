"""A box of a decoded frame, resized to a square: cropped as planes, then scaled and converted in one pass by FFmpeg.

Whatever the video has (10 bits, full range, BT.709, other subsampling, rotation) comes out in one form.
"""

from __future__ import annotations

import itertools
from typing import Any

import av
import av.filter
import numpy as np
from numpy.typing import NDArray

from vswin_dist.video import BT601, Orientation, VideoInfo, has_full_range, matrix_of, orientation, stores_yuv

Box = tuple[float, float, float, float]  # top, left, height, width in pixels as displayed

_PLANES = {"rgb": ("gbrp", (2, 0, 1)), "yuv": ("yuv420p", (0, 1, 2))}  # FFmpeg's format, and its planes in our order


class Scaler:
    """Cut boxes out of frames of one video, keeping the filter graph of each box and kind of frame.

    Args: as those of `decode.decode_views`.
    """

    def __init__(self, video: VideoInfo, size: int, pixel_format: str) -> None:
        self.video, self.size, self.pixel_format = video, size, pixel_format
        self._graphs: dict[tuple[Any, ...], av.filter.Graph] = {}

    def __call__(self, frame: av.VideoFrame, box: Box) -> list[NDArray[np.uint8]]:
        """R, G, B [S, S], or Y [S, S], U, V [S/2, S/2], as views of FFmpeg's memory that live on with them."""
        turned = orientation(frame)
        shape = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, turned, box)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._build(frame, box, turned)
        graph.push(frame)
        planes = graph.pull().planes
        return [
            np.ndarray((p.height, p.width), np.uint8, buffer=p, strides=(p.line_size, 1))  # type: ignore[call-overload]
            for p in (planes[i] for i in _PLANES[self.pixel_format][1])
        ]

    def _build(self, frame: av.VideoFrame, box: Box, turned: Orientation) -> av.filter.Graph:
        """buffer -> crop -> scale and convert -> [turn], for frames of this kind."""
        top, left, height, width = pixels_of(frame, box, self.video, turned)
        graph = av.filter.Graph()
        graph.threads = 1
        source = graph.add(
            "buffer",
            video_size=f"{frame.width}x{frame.height}",
            pix_fmt=frame.format.name,
            time_base="1/1000",
            pixel_aspect="1/1",
            colorspace=str(frame.colorspace),
            range=str(frame.color_range),
        )
        steps = [
            *_eight_bits(frame),
            ("crop", f"{width}:{height}:{left}:{top}:exact=1"),
            (
                "scale",
                f"{self.size}:{self.size}:flags=bilinear{self._made(frame)}{_chroma_start(frame, top, left, height, width)}",
            ),
            ("format", _PLANES[self.pixel_format][0]),
            *self._recoloured(frame),
            *turned.filters(),
            ("buffersink", ""),
        ]
        for before, after in itertools.pairwise([source, *(graph.add(name, how or None) for name, how in steps)]):
            before.link_to(after)
        graph.configure()
        return graph

    def _made(self, frame: av.VideoFrame) -> str:
        """Return the scaler's options for the pixels that it makes.

        RGB: to be exact also where nothing is resized (it has a coarse short cut there). YUV: chroma in the middle of its
        four pixels, so that a flip or turn keeps it there; and exact where it is made of more than 4:2:0, which is off by
        more than a step else.
        """
        if self.pixel_format == "rgb":
            return "+accurate_rnd"
        exact = frame.format.chroma_height(2) == 2 and not self.video.earlier_colours
        matrix = "" if self._keeps_planes(frame) else ":out_color_matrix=bt601:out_range=tv"
        return f"{'+accurate_rnd' if exact else ''}:out_chroma_loc=center{matrix}"

    def _keeps_planes(self, frame: av.VideoFrame) -> bool:
        """Whether the scaler leaves matrix and range as they are; it makes BT.601 limited range of RGB and the like."""
        return not frame.format.is_rgb if self.video.earlier_colours else stores_yuv(frame)

    def _recoloured(self, frame: av.VideoFrame) -> list[tuple[str, str]]:
        """Return the step that makes BT.601 limited range of other YUV; the scaler alone would go through RGB for it."""
        full, matrix = has_full_range(frame), matrix_of(frame)
        if self.pixel_format == "rgb" or not self._keeps_planes(frame) or not (full or matrix != BT601):
            return []
        return [
            (
                "colorspace",
                f"all={BT601}:iall={BT601}:ispace={matrix}:irange={'pc' if full else 'tv'}:"
                f"space={BT601}:range=tv:fast=1:format=yuv420p",
            )
        ]


def pixels_of(frame: av.VideoFrame, box: Box, video: VideoInfo, turned: Orientation) -> tuple[int, int, int, int]:
    """Convert `box` to (top, left, height, width) in whole pixels of the frame as it is stored: turned back, and with its
    pixels' shape."""
    high, wide = (frame.width, frame.height) if turned.transposed else (frame.height, frame.width)  # as displayed
    y, x = high / video.height, wide / video.width
    top, left = min(int(box[0] * y + 0.5), high - 1), min(int(box[1] * x + 0.5), wide - 1)
    bottom = min(max(int((box[0] + box[2]) * y + 0.5), top + 1), high)
    right = min(max(int((box[1] + box[3]) * x + 0.5), left + 1), wide)
    if turned.mirrored:
        left, right = wide - right, wide - left
    if turned.inverted:
        top, bottom = high - bottom, high - top
    if turned.transposed:
        top, left, bottom, right = left, top, right, bottom
    return top, left, bottom - top, right - left


def _eight_bits(frame: av.VideoFrame) -> list[tuple[str, str]]:
    """Return the step to 8 bits of deeper planes: FFmpeg's crop mistakes the position of their chroma at odd pixels."""
    deep = max(c.bits for c in frame.format.components) > 8 and frame.format.chroma_width(2) == 1
    return [("format", "yuv422p" if frame.format.chroma_height(2) == 2 else "yuv420p")] if deep else []


def _chroma_start(frame: av.VideoFrame, top: int, left: int, height: int, width: int) -> str:
    """Where the crop's first chroma sample lies, in 1/256 pixel: at the left, as in MPEG-2 to AV1, between two lines.

    A crop that begins at an odd pixel begins with the chroma sample of the pixel before it. One of odd length has half a
    sample too many, which FFmpeg squeezes in: half a pixel to the right, chroma is off by half a pixel at most.
    """
    position = ""
    if frame.format.chroma_width(2) == 1:
        position += f":in_h_chr_pos={-256 * (left % 2) + 128 * (width % 2)}"
    if frame.format.chroma_height(2) == 1:
        position += f":in_v_chr_pos={128 - 256 * (top % 2) + 128 * (height % 2)}"
    return position
