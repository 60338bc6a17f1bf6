"""The views of a video from its bytes: decode only what they need, crop and resize each frame once, as planes.

Packets, or the tables of a plain mp4, say before anything is decoded which frame is which. From the key frame before
each wanted frame to that frame everything goes to the decoder, except h264 frames that no other frame refers to
(nal_ref_idc 0) and that are not wanted.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vswin_dist.data.video import mp4
from vswin_dist.data.video.crop_resize import Box, Scaler
from vswin_dist.data.video.stored_crop import Changed, Crop, Cut, cut_of, resized
from vswin_dist.errors import ConfigError, DataError
from vswin_dist.video import Video, VideoError, VideoInfo

READ_AHEAD = 8  # packets read after the last wanted frame's number is reached, before it is asked whether they suffice
FAILURES = (VideoError, av.FFmpegError, OSError, IndexError, ValueError)  # what damaged bytes raise, here and in PyAV

av.logging.set_level(av.logging.PANIC)  # damaged files are reported by exceptions


class View(NamedTuple):
    """One clip: frame numbers int64 [T] in presentation order (any order, repeats allowed) and what is cut out of them."""

    indices: NDArray[np.int64]
    box: Box


def clip_shape(frames: int, size: int, pixel_format: str) -> tuple[int, ...]:
    """Give the shape of one clip: (3, T, S, S) in rgb, (T, S * S * 3 / 2) in yuv; of native the most, (3 * T * S * S,).

    Raises:
        ConfigError: planes of an odd size.
    """
    if pixel_format == "rgb":
        return 3, frames, size, size
    if size % 2:
        raise ConfigError(
            f"data.pixel_format={pixel_format} needs an even data.size, not {size}: chroma planes have half of it"
        )
    return (frames, size * size * 3 // 2) if pixel_format == "yuv" else (3 * frames * size * size,)


def decode_views(
    data: bytes,
    views: Sequence[View],
    video: VideoInfo,
    *,
    size: int,
    flip: bool = False,
    pixel_format: str = "rgb",
    out: Tensor | None = None,
) -> Tensor:
    """Cut `views` out of a video; a frame that several of them share is decoded once.

    Args:
        data: the file's bytes, in any container that FFmpeg reads.
        views: V of them, all of T frames.
        video: what the manifest says of it: the views' indices are below its frames, their boxes measured in its pixels.
        size: S, pixels of the square that each box becomes.
        flip: mirror every view.
        pixel_format: rgb, or yuv: planes Y [S, S], U and V [S/2, S/2] one after the other, BT.601 limited range with
            centred chroma whatever the video has; `normalise.to_rgb` takes them.
        out: where to write, of the result's shape; after an error it holds anything. None: a new tensor.

    Returns:
        uint8 [V, 3, T, S, S] (rgb) or [V, T, S * S * 3 / 2] (yuv), rotated as displayed, resized bilinearly with
        half-pixel centres (averaging where it shrinks).

    Raises:
        DataError: the file cannot be opened, or a frame asked for cannot be decoded.
        ConfigError: see `clip_shape`.
    """
    targets: dict[int, dict[Box, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for v, view in enumerate(views):
        for t, index in enumerate(view.indices.tolist()):
            targets[index][view.box].append((v, t))
    shape = len(views), *clip_shape(len(views[0].indices), size, pixel_format)
    out = torch.empty(shape, dtype=torch.uint8) if out is None else out
    assert out.shape == shape, f"views of {shape} do not go into {tuple(out.shape)}"
    planes, pixels = _planes(out.numpy(), size), "u1"
    if flip:
        planes, pixels = _from_the_right(planes)
    scaler = Scaler(video, size, pixel_format)

    def write(index: int, frame: av.VideoFrame) -> None:
        for box, uses in targets[index].items():
            made = scaler(frame, box)
            for plane, source in zip(planes, made, strict=True):
                for v, t in uses:
                    plane[v, t] = source.view(pixels)

    _each_frame(data, targets, video, write)
    return out


def decode_crop(data: bytes, view: View, video: VideoInfo, *, size: int, flip: bool, out: Tensor) -> Crop:
    """Cut one view out of a video as it is stored, for `resample.crops_to_rgb` to resize; see `stored_crop`.

    Args:
        size: that it will have.
        out: uint8 of at least T * size * size * 3 bytes, of which the first T * `Crop.bytes` are written.

    Raises:
        DataError, ConfigError: as `decode_views`.
    """
    times: dict[int, list[int]] = defaultdict(list)
    for t, index in enumerate(view.indices.tolist()):
        times[index].append(t)
    smaller = resized(size, flip)
    scaler = Scaler(video, size, "yuv")
    found: list[tuple[Cut | None, list[NDArray[np.uint8]]]] = []  # one, from the first frame on

    def room(crop: Crop) -> Tensor:
        return out[: len(view.indices) * crop.bytes].view(len(view.indices), crop.bytes)

    def write(index: int, frame: av.VideoFrame) -> None:
        if not found:
            cut = cut_of(frame, view.box, video, 3 * size * size, flip)
            crop = cut.crop if cut else smaller
            found.append((cut, crop.planes(room(crop).numpy())))
        cut, planes = found[0]
        for plane, source in zip(planes, cut(frame) if cut else scaler(frame, view.box), strict=True):
            for t in times[index]:
                plane[t] = source

    try:
        _each_frame(data, times, video, write)
    except Changed:
        decode_views(data, [view], video, size=size, pixel_format="yuv", out=room(smaller)[None])
        return smaller
    cut, _ = found[0]
    return cut.crop if cut else smaller


def _each_frame(data: bytes, wanted: Collection[int], video: VideoInfo, take: Callable[[int, av.VideoFrame], None]) -> None:
    """Call `take` with each of the frames `wanted`, by number, in no promised order.

    Raises:
        DataError: as `decode_views`; also where `take` fails.
    """
    if min(wanted) < 0 or max(wanted) >= video.frames:
        raise DataError(f"{video.name}: frames {min(wanted)}..{max(wanted)} asked for, it has {video.frames}")
    left = set(wanted)
    try:
        for index, frame in wanted_frames(data, wanted, video.frames):
            take(index, frame)
            left.discard(index)
    except FAILURES as error:
        raise DataError(f"{video.name}: cannot be decoded: {error}") from error
    if left:
        raise DataError(f"{video.name}: frame {min(left)} of {video.frames} does not decode")


def _planes(clips: NDArray[np.uint8], size: int) -> list[NDArray[Any]]:
    """R, G, B, or Y, U, V of clips of either form (see `clip_shape`), each [V, T, height, width], in the same memory."""
    if clips.ndim == 5:
        return [clips[:, channel] for channel in range(3)]
    parts = np.split(clips, (size * size, size * size * 5 // 4), axis=2)
    sides = (size, size // 2, size // 2)
    return [part.reshape(*clips.shape[:2], side, side) for part, side in zip(parts, sides, strict=True)]


def _from_the_right(planes: list[NDArray[np.uint8]]) -> tuple[list[NDArray[Any]], str]:
    """`planes` that mirror what is written to them, and the type as which rows of pixels must be written.

    Where rows allow, it is eight pixels at a time, whose order the words' byte order turns: many times as fast.
    """
    if any(plane.shape[-1] % 8 for plane in planes):
        return [plane[..., ::-1] for plane in planes], "u1"
    return [plane.view(">u8")[..., ::-1] for plane in planes], "<u8"


def wanted_frames(data: bytes, wanted: Collection[int], frames: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode those of `wanted` that can be, as (number, frame), each once, in no promised order.

    Raises:
        One of `FAILURES`: not even counting from the start gives the rest.
    """
    left = set(wanted)
    tables = mp4.read(data)
    direct = _by_tables(tables, left) if tables and len(tables.sizes) == frames else _by_packets(data, sorted(left), frames)
    for found in (direct, _from_start(data)):
        for number, frame in found:
            if number in left:
                left.discard(number)
                yield number, frame
                if not left:
                    return


class Limits(NamedTuple):
    """What a video may take that a stranger sends."""

    seconds: float = math.inf  # in which all of its frames are to be decoded
    pixels: float = math.inf  # of a frame

    def check_size(self, what: Any, name: str) -> None:
        """Refuse a frame, or a stream before any is decoded, of more pixels.

        Raises:
            DataError: says which size it has.
        """
        if what.width * what.height > self.pixels:
            raise DataError(
                f"{name}: frames of {what.width} x {what.height} have more than {self.pixels:,.0f} pixels: make them smaller"
            )


def video_info(data: bytes, name: str, limits: Limits = Limits()) -> VideoInfo:  # noqa: B008 - a tuple
    """Find out by a full decode what a manifest says of a video; `name` is what errors call it.

    Raises:
        DataError: the file cannot be opened or decoded, has no video frame, or exceeds `limits`.
    """
    total, shown, end = 0, (0, 0), time.monotonic() + limits.seconds
    try:
        with Video(data) as video:
            limits.check_size(video.stream.codec_context, name)
            for frame in video.frames():
                limits.check_size(frame, name)
                if time.monotonic() > end:
                    raise DataError(
                        f"{name}: decoding it takes more than {limits.seconds:g} s, after {total} frames: cut it shorter"
                    )
                if not total:
                    shown = video.displayed_size(frame)
                total += 1
    except FAILURES as error:
        raise DataError(f"{name}: cannot be decoded: {error}") from error
    if not total:
        raise DataError(f"{name}: has no video frame")
    return VideoInfo(total, *shown, name)


def _by_tables(tables: mp4.Mp4Tables, wanted: Collection[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode what `wanted` needs; ends early where that does not decode."""
    decoder, number = tables.decoder(), {i: i for i in wanted}
    try:
        for start, stop in spans(tables.numbers.tolist(), tables.keys.tolist(), number):
            yield from _decode(decoder, tables.packets(start, stop, number), number)
    except av.FFmpegError:
        return


def _by_packets(data: bytes, wanted: list[int], frames: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """As `_by_tables`, of any file; ends also where packets do not say which frame is which."""
    with Video(data) as video:
        packets = _packets(video, wanted[-1], frames)
        found = {p.pts for p in packets}
        if len(found) != len(packets) or len(found) <= wanted[-1] or None in found:
            return
        times = sorted(found)
        number = {times[i]: i for i in wanted}
        decoder = video.stream.codec_context
        # By the standard nothing refers to such a frame in h264; elsewhere the decoders' notion is less strict.
        skips = decoder.name == "h264"
        try:
            keys = [i for i, p in enumerate(packets) if p.is_keyframe]
            for start, stop in spans([p.pts for p in packets], keys, number):
                yield from _decode(decoder, packets[start:stop], number, skips)
        except av.FFmpegError:
            return


def _packets(video: Video, last: int, frames: int) -> list[Any]:
    """Return the packets in decoding order; none where they are not one for each frame.

    Where the container says that they are, as mp4 does, no more are read than settle which frame is number `last`: later
    packets are decoded, and so shown, after the time at which the latest one read is decoded.
    """
    packets: list[Any] = []
    one_each = video.stream.frames == frames
    with video.packets() as demuxed:
        for packet in demuxed:
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:  # what is made up for it depends on the frames before
                return []
            packets.append(packet)
            ahead = len(packets) - last
            if one_each and ahead > 0 and ahead % READ_AHEAD == 0 and packet.dts is not None:
                times = [p.pts for p in packets]
                if None not in times and sorted(times)[last] < packet.dts:
                    return packets
    return packets if len(packets) == frames else []


def spans(times: Sequence[int], keys: Sequence[int], wanted: Collection[int]) -> list[tuple[int, int]]:
    """Return the packets, as [start, stop) in decoding order, to be decoded for the frames at the times `wanted`.

    Args:
        times: when each packet's frame is shown.
        keys: the packets that are key frames.
    """
    ordered = sorted((times[key], key) for key in keys)
    key_times = [time for time, _ in ordered]
    index_of = {time: index for index, time in enumerate(times)}
    spans: list[tuple[int, int]] = []
    needs = ((ordered[max(bisect_right(key_times, time) - 1, 0)][1], index_of[time] + 1) for time in wanted) if keys else ()
    for start, stop in sorted(needs):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return spans


def _decode(
    decoder: Any, packets: Iterable[Any], number: dict[int, int], skips: bool = False
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield the frames of one span whose times are in `number`; the decoder is empty before and after.

    Args:
        skips: have the decoder leave out those of the others that nothing refers to.
    """
    for packet in [*packets, None]:  # None: give out what is waiting for its turn
        if skips and packet is not None:
            decoder.skip_frame = "DEFAULT" if packet.pts in number else "NONREF"
        for frame in decoder.decode(packet):
            if frame.pts in number:
                yield number[frame.pts], frame
    decoder.flush_buffers()


def _from_start(data: bytes) -> Iterator[tuple[int, av.VideoFrame]]:
    """Every frame by counting, as data_prep counts them: packets that do not decode give none."""
    number = 0
    with Video(data) as video, video.packets() as demuxed:
        for packet in demuxed:
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                continue
            for frame in decoded:
                yield number, frame
                number += 1
