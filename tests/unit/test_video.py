"""What a video file is: its stream, displayed size, orientation and colours, and what is said of files without one."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import pytest
from av.stream import Disposition

from data_prep.encode import process
from data_prep.settings import Encoding
from tests.support.heap import growth, needs_heap
from tests.unit.data.test_decode import MATRICES, picture, shown_by, turned, write
from tests.unit.data_prep.videos import make_sound
from vswin_dist.data.video.decode import video_info
from vswin_dist.errors import DataError
from vswin_dist.video import (
    BT601,
    FULL_RANGE,
    LIMITED_RANGE,
    Video,
    VideoError,
    VideoInfo,
    has_full_range,
    matrix_of,
    orientation,
)


def plain(container: str = "mp4", frames: int = 3) -> bytes:
    return write([picture(96, 64)] * frames, (96, 64), container=container, crf="1")


def wide_pixels(container: str) -> bytes:
    """64 x 48 pixels, each one and a half times as wide as high."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as c:
        stream: Any = c.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        for _ in range(3):
            c.mux(stream.encode(av.VideoFrame.from_ndarray(picture(64, 48), format="rgb24")))
        c.mux(stream.encode(None))
    return out.getvalue()


def with_cover(sound: Path) -> bytes:
    """Sound and the picture on its cover, in mp4."""
    out = io.BytesIO()
    with av.open(str(sound)) as source, av.open(out, "w", format="mp4") as c:
        heard = c.add_stream_from_template(source.streams.audio[0])
        seen: Any = c.add_stream("mjpeg", rate=1)
        seen.width, seen.height, seen.pix_fmt, seen.disposition = 96, 64, "yuvj420p", Disposition.attached_pic
        c.mux(seen.encode(av.VideoFrame.from_ndarray(picture(96, 64), format="rgb24")))
        c.mux(seen.encode(None))
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = heard
                c.mux(packet)
    return out.getvalue()


def without_codec() -> bytes:
    """An mp4 whose video is of a codec that nobody knows."""
    data = plain()
    at = data.rindex(b"avc1", 0, data.rindex(b"avcC"))
    return data[:at] + b"zzzz" + data[at + 4 :]


@pytest.mark.parametrize(
    ("kind", "reason", "message", "detail"),
    [
        (
            "text",
            "unreadable",
            "Invalid data found when processing input: '<none>'",
            "Invalid data found when processing input",
        ),
        ("nothing", "unreadable", "Invalid data found when processing input: '<none>'", "the file is empty"),
        ("sound", "no_video_stream", "it has no video stream", "the container holds audio"),
        ("cover", "no_video_stream", "it has no video stream", "the container holds a cover picture, audio"),
        ("unknown", "unknown_codec", "its codec is unknown", "FFmpeg has no decoder for it"),
    ],
)
def test_both_readers_say_what_a_file_without_a_video_lacks(
    kind: str, reason: str, message: str, detail: str, tmp_path: Path
) -> None:
    files = {
        "text": lambda: b"not a video",
        "nothing": lambda: b"",
        "sound": lambda: make_sound(tmp_path / "a.mp4").read_bytes(),
        "cover": lambda: with_cover(make_sound(tmp_path / "a.mp4")),
        "unknown": without_codec,
    }
    data = files[kind]()
    with pytest.raises(VideoError) as caught:
        Video(data)
    assert (caught.value.reason, caught.value.detail) == (reason, detail)
    assert str(caught.value).endswith(message)
    outcome, _ = process(data, Encoding(), "a.mp4")
    assert (outcome.verdict, outcome.detail) == (reason, detail)
    with pytest.raises(DataError, match=r"^a\.mp4: cannot be decoded: ") as refused:
        video_info(data, "a.mp4")
    assert str(refused.value).endswith(message)


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_frame_is_shown_by_its_display_matrix(matrix: tuple[int, ...]) -> None:
    data, source = turned(plain(), matrix), picture(96, 64)
    wanted = shown_by(matrix, source)
    with Video(data) as video:
        frame = next(video.frames())
        assert video.displayed_size(frame) == wanted.shape[1::-1]
    assert np.array_equal(filtered(source, orientation(frame).filters()), wanted)
    outcome, _ = process(data, Encoding(profile="copy"), "a.mp4")
    assert video_info(data, "a") == VideoInfo(3, *wanted.shape[1::-1], "a")
    assert (outcome.frames, outcome.width, outcome.height) == (3, *wanted.shape[1::-1])


def filtered(source: np.ndarray, filters: tuple[tuple[str, str], ...]) -> np.ndarray:
    """What FFmpeg's `filters` make of a picture, uint8 [H, W, 3]."""
    graph = av.filter.Graph()
    chain = [graph.add_buffer(width=source.shape[1], height=source.shape[0], format="gbrp", time_base=Fraction(1, 25))]
    chain += [graph.add(name, how or None) for name, how in filters]
    graph.link_nodes(*chain, graph.add("buffersink")).configure()
    graph.push(av.VideoFrame.from_ndarray(source, format="gbrp"))
    made: Any = graph.pull()
    return np.asarray(made.to_ndarray(format="gbrp"))


# EXIF 2.32, 4.6.4 A: orientation -> the display matrix that says the same
EXIF = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


@pytest.mark.parametrize("number", EXIF)
def test_a_frame_is_shown_by_its_exif(number: int) -> None:
    """Motion JPEG of cameras; PyAV does not know that kind of side data."""
    data = write([picture(96, 64)] * 3, (96, 64), "mjpeg", "mjpeg", "yuvj420p", full=True)
    tag = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, number, 0, 0)
    segment = b"\xff\xe1" + struct.pack(">H", len(tag) + 2) + tag
    with Video(data.replace(b"\xff\xd8", b"\xff\xd8" + segment)) as video:
        for frame in video.frames():
            made = filtered(picture(96, 64), orientation(frame).filters())
            assert np.array_equal(made, shown_by(EXIF[number], picture(96, 64)))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_the_displayed_size_has_square_pixels(container: str) -> None:
    data = wide_pixels(container)
    outcome, _ = process(data, Encoding(profile="copy"), "a.mp4")
    assert video_info(data, "a") == VideoInfo(3, 96, 48, "a")
    assert (outcome.width, outcome.height) == (96, 48)


def test_colours_have_the_filters_names() -> None:
    frame: Any = av.VideoFrame(32, 32, "yuv420p")
    frame.colorspace, frame.color_range = 6, LIMITED_RANGE
    assert matrix_of(frame) == BT601 and not has_full_range(frame)
    frame.colorspace, frame.color_range = 1, FULL_RANGE
    assert matrix_of(frame) == "bt709" and has_full_range(frame)
    assert has_full_range(av.VideoFrame(32, 32, "yuvj420p"))


def test_other_streams_packets_come_where_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        seen: Any = out.add_stream("libx264", rate=25)
        seen.width, seen.height, seen.pix_fmt = 32, 32, "yuv420p"
        heard: Any = out.add_stream("aac", rate=16000)
        for _ in range(5):
            out.mux(seen.encode(av.VideoFrame.from_ndarray(picture(32, 32), format="rgb24")))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 3200), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 16000, 0
        out.mux(heard.encode(sound))
        out.mux(seen.encode(None))
        out.mux(heard.encode(None))
    for all_streams, kinds in ((False, {"video"}), (True, {"video", "audio"})):
        with Video(path.read_bytes()) as video, video.packets(all_streams) as packets:
            assert {p.stream.type for p in packets} == kinds


@needs_heap
def test_frames_that_are_dropped_half_way_leak_nothing() -> None:
    data = plain("matroska", 12)

    def read() -> None:
        with Video(data) as video:
            for number, _ in enumerate(video.frames()):
                if number == 2:
                    break

    assert growth(read) < 50, "an AVPacket alone has 104 bytes"
