"""Frames of a video from its bytes: seek to the key frame before the clip, decode to its last frame."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from vswin_dist.errors import DataError

Frames = NDArray[np.uint8]  # [T, H, W, 3], RGB

av.logging.set_level(av.logging.PANIC)  # damaged files are reported by exceptions


def decode_frames(data: bytes, indices: Sequence[int] | NDArray[np.int64], frames: int, name: str) -> Frames:
    """The frames of a video at `indices` (in presentation order, repeats allowed).

    Args:
        data: the file's bytes, in any container that FFmpeg reads.
        frames: the number of frames that a full decode gives (the manifest's); indices are below it.
        name: what to call the video in an error.

    Returns:
        uint8 [len(indices), H, W, 3], RGB, rotated as displayed.

    Raises:
        DataError: the file cannot be opened, or a frame asked for cannot be decoded.
    """
    wanted = np.unique(np.asarray(indices))
    if wanted[0] < 0 or wanted[-1] >= frames:
        raise DataError(f"{name}: frames {wanted[0]}..{wanted[-1]} asked for, it has {frames}")
    try:
        found = _decode_by_seeking(data, wanted, frames)
        if found is None:
            found = _decode_from_start(data, wanted)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise DataError(f"{name}: cannot be decoded: {error}") from error
    if missing := [int(i) for i in wanted if int(i) not in found]:
        raise DataError(f"{name}: frame {missing[0]} of {frames} does not decode")
    return np.stack([found[int(i)] for i in indices])


def count_frames(data: bytes, name: str) -> int:
    """Frames that a full decode gives.

    Raises:
        DataError: the file cannot be opened or decoded, or has no video frame.
    """
    try:
        with av.open(io.BytesIO(data)) as container:
            total = sum(1 for _ in container.decode(container.streams.video[0]))
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise DataError(f"{name}: cannot be decoded: {error}") from error
    if not total:
        raise DataError(f"{name}: has no video frame")
    return total


def _decode_by_seeking(data: bytes, wanted: NDArray[np.int64], frames: int) -> dict[int, Frames] | None:
    """{index: frame [H, W, 3]}, or None where the packets' timestamps do not tell which frame is which."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        times, key_times = [], []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                if packet.pts is None:
                    return None
                times.append(packet.pts)
                if packet.is_keyframe:
                    key_times.append(packet.pts)
        if len(times) != frames or len(set(times)) != frames:
            return None
        times.sort()
        index_of = {times[i]: int(i) for i in wanted}
        before = [t for t in key_times if t <= times[wanted[0]]]
        if not before:
            return None
        container.seek(max(before), stream=stream)
        found: dict[int, Frames] = {}
        converter = VideoReformatter()
        for frame in container.decode(stream):
            if frame.pts in index_of:
                found[index_of[frame.pts]] = _to_rgb(frame, converter)
                if len(found) == len(wanted):
                    return found
    return None


def _decode_from_start(data: bytes, wanted: NDArray[np.int64]) -> dict[int, Frames]:
    """{index: frame [H, W, 3]} by counting; fewer than asked for where the file ends before."""
    chosen = {int(i) for i in wanted}
    found: dict[int, Frames] = {}
    converter = VideoReformatter()
    with av.open(io.BytesIO(data)) as container:
        for number, frame in enumerate(container.decode(container.streams.video[0])):
            if number in chosen:
                found[number] = _to_rgb(frame, converter)
                if len(found) == len(chosen):
                    break
    return found


def _to_rgb(frame: av.VideoFrame, converter: VideoReformatter) -> Frames:
    """uint8 [H, W, 3], turned as the container says it is to be shown. `converter` keeps its tables between frames."""
    image: Frames = converter.reformat(frame, format="rgb24").to_ndarray()  # type: ignore[assignment]
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise
    return np.rot90(image, quarter_turns) if quarter_turns else image
