"""The views of a video from its bytes: decode only what they need, crop and resize each frame once, as planes.

Packets, or the tables of a plain mp4, tell before anything is decoded which frame is which. From the key frame before
each wanted frame to that frame everything goes to the decoder, except h264 frames that no other frame refers to
(nal_ref_idc 0) and that are not wanted.
"""

from __future__ import annotations

import contextlib
import io
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import av
import av.container
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vswin_dist.data import mp4
from vswin_dist.data.scale import Box, Scaler
from vswin_dist.errors import ConfigError, DataError

READ_AHEAD = 8  # packets read after the last wanted frame's number is reached, before it is asked whether they suffice
FAILURES = (av.FFmpegError, OSError, IndexError, ValueError)  # what damaged bytes raise in PyAV

av.logging.set_level(av.logging.PANIC)  # damaged files are reported by exceptions


class View(NamedTuple):
    """One clip: frame numbers int64 [T] in presentation order (any order, repeats allowed) and what is cut out of them."""

    indices: NDArray[np.int64]
    box: Box


def clip_shape(frames: int, size: int, pixel_format: str) -> tuple[int, ...]:
    """The shape of one clip: (3, T, S, S) in rgb, (T, S * S * 3 / 2) in yuv.

    Raises:
        ConfigError: yuv of an odd size.
    """
    if pixel_format == "rgb":
        return 3, frames, size, size
    if size % 2:
        raise ConfigError(f"data.pixel_format=yuv needs an even data.size, not {size}: chroma planes have half of it")
    return frames, size * size * 3 // 2


def decode_views(data: bytes, views: Sequence[View], *, frames: int, width: int, height: int, size: int,
                 flip: bool = False, pixel_format: str = "rgb", name: str, out: Tensor | None = None) -> Tensor:
    """Cut `views` out of a video; a frame that several of them share is decoded once.

    Args:
        data: the file's bytes, in any container that FFmpeg reads.
        views: V of them, all of T frames.
        frames: the number of frames that a full decode gives (the manifest's); indices are below it.
        width, height: pixels as displayed (the manifest's), in which the boxes are measured.
        size: S, pixels of the square that each box becomes.
        flip: mirror every view.
        pixel_format: rgb, or yuv: planes Y [S, S], U and V [S/2, S/2] one after the other, BT.601 limited range with
            centred chroma whatever the video has; `transforms.to_rgb` takes them.
        name: what to call the video in an error.
        out: where to write, of the result's shape; after an error it holds anything. None: a new tensor.

    Returns:
        uint8 [V, 3, T, S, S] (rgb) or [V, T, S * S * 3 / 2] (yuv), rotated as displayed, resized bilinearly with
        half-pixel centres (averaging where it shrinks).

    Raises:
        DataError: the file cannot be opened, or a frame asked for cannot be decoded. ConfigError: see `clip_shape`.
    """
    places: dict[int, dict[Box, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for v, view in enumerate(views):
        for t, index in enumerate(view.indices.tolist()):
            places[index][view.box].append((v, t))
    if min(places) < 0 or max(places) >= frames:
        raise DataError(f"{name}: frames {min(places)}..{max(places)} asked for, it has {frames}")
    shape = len(views), *clip_shape(len(views[0].indices), size, pixel_format)
    out = torch.empty(shape, dtype=torch.uint8) if out is None else out
    assert out.shape == shape, f"views of {shape} do not go into {tuple(out.shape)}"
    planes, pixels = _planes(out.numpy(), size), "u1"
    if flip:
        planes, pixels = _from_the_right(planes)
    scaler = Scaler(width, height, size, pixel_format)
    left = set(places)
    try:
        for index, frame in wanted_frames(data, places, frames):
            for box, uses in places[index].items():
                made = scaler(frame, box)
                for plane, source in zip(planes, made, strict=True):
                    for v, t in uses:
                        plane[v, t] = source.view(pixels)
            left.discard(index)
    except FAILURES as error:
        raise DataError(f"{name}: cannot be decoded: {error}") from error
    if left:
        raise DataError(f"{name}: frame {min(left)} of {frames} does not decode")
    return out


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
    """(number, frame) of those of `wanted` that decode, each once, in no promised order. Raises one of `FAILURES`."""
    left = set(wanted)
    video = mp4.read(data)
    told = _by_tables(video, left) if video and len(video.sizes) == frames else _by_packets(data, sorted(left), frames)
    for found in (told, _from_start(data)):
        for number, frame in found:
            if number in left:
                left.discard(number)
                yield number, frame
                if not left:
                    return


def count_frames(data: bytes, name: str) -> tuple[int, int, int]:
    """Frames that a full decode gives, and their width and height in pixels as displayed.

    Raises:
        DataError: the file cannot be opened or decoded, or has no video frame.
    """
    total, shown = 0, (0, 0)
    try:
        with _open(data) as container:
            stream = _stream(container)
            for frame in container.decode(stream):
                if not total:
                    shown = (max(1, round(frame.width * float(stream.sample_aspect_ratio or 1))), frame.height)
                    shown = shown[::-1] if round(frame.rotation / 90) % 2 else shown
                total += 1
    except FAILURES as error:
        raise DataError(f"{name}: cannot be decoded: {error}") from error
    if not total:
        raise DataError(f"{name}: has no video frame")
    return total, *shown


def _open(data: bytes) -> av.container.InputContainer:
    return av.open(io.BytesIO(data), metadata_errors="ignore")


def _stream(container: av.container.InputContainer) -> Any:
    """The first stream that is no cover picture, decoding in this thread alone."""
    streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition).lower()]
    if not streams:
        raise ValueError("it has no video stream")
    if streams[0].codec_context is None:
        raise ValueError("its codec is unknown")
    streams[0].thread_type = "NONE"
    streams[0].codec_context.thread_count = 1
    return streams[0]


@contextlib.contextmanager
def _demuxed(container: av.container.InputContainer, stream: Any) -> Iterator[Iterator[Any]]:
    """The packets of `stream`. Closed in any case: PyAV 18 leaks a packet where the reading is dropped half-way, and
    each of them, though small, pins a place of the heap."""
    packets: Any = container.demux(stream)
    with contextlib.closing(packets):
        yield packets


def _by_tables(video: mp4.Video, wanted: Collection[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Decode what `wanted` needs; ends early where that does not decode."""
    decoder, number = video.decoder(), {i: i for i in wanted}
    try:
        for start, stop in spans(video.numbers.tolist(), video.keys.tolist(), number):
            yield from _decode(decoder, video.packets(start, stop, number), number)
    except av.FFmpegError:
        return


def _by_packets(data: bytes, wanted: list[int], frames: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """As `_by_tables`, of any file; ends also where packets do not tell the frames."""
    with _open(data) as container:
        stream = _stream(container)
        packets = _packets(container, stream, wanted[-1], frames)
        found = {p.pts for p in packets}
        if len(found) != len(packets) or len(found) <= wanted[-1] or None in found:
            return
        times = sorted(found)
        number = {times[i]: i for i in wanted}
        # By the standard nothing refers to such a frame in h264; elsewhere the decoders' notion is less strict.
        skips = stream.codec_context.name == "h264"
        try:
            keys = [place for place, p in enumerate(packets) if p.is_keyframe]
            for start, stop in spans([p.pts for p in packets], keys, number):
                yield from _decode(stream.codec_context, packets[start:stop], number, skips)
        except av.FFmpegError:
            return


def _packets(container: av.container.InputContainer, stream: Any, last: int, frames: int) -> list[Any]:
    """The packets in decoding order; none where they are not one for each frame.

    Where the container says that they are, as mp4 does, no more are read than tell which frame is number `last`: later
    packets are decoded, and so shown, after the time at which the latest one read is decoded.
    """
    packets: list[Any] = []
    told = stream.frames == frames
    with _demuxed(container, stream) as demuxed:
        for packet in demuxed:
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:  # what is made up for it depends on the frames before
                return []
            packets.append(packet)
            ahead = len(packets) - last
            if told and ahead > 0 and ahead % READ_AHEAD == 0 and packet.dts is not None:
                times = [p.pts for p in packets]
                if None not in times and sorted(times)[last] < packet.dts:
                    return packets
    return packets if len(packets) == frames else []


def spans(times: Sequence[int], keys: Sequence[int], wanted: Collection[int]) -> list[tuple[int, int]]:
    """The packets, as [start, stop) in decoding order, to be decoded for the frames at the times `wanted`.

    Args:
        times: when each packet's frame is shown.
        keys: the packets that are key frames.
    """
    ordered = sorted((times[place], place) for place in keys)
    key_times = [time for time, _ in ordered]
    place_of = {time: place for place, time in enumerate(times)}
    spans: list[tuple[int, int]] = []
    needs = ((ordered[max(bisect_right(key_times, time) - 1, 0)][1], place_of[time] + 1) for time in wanted) if keys else ()
    for start, stop in sorted(needs):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return spans


def _decode(decoder: Any, packets: Iterable[Any], number: dict[int, int],
            skips: bool = False) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames of one span whose times are in `number`; the decoder is empty before and after.

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
    with _open(data) as container, _demuxed(container, _stream(container)) as demuxed:
        for packet in demuxed:
            try:
                decoded = packet.decode()
            except av.FFmpegError:
                continue
            for frame in decoded:
                yield number, frame
                number += 1
