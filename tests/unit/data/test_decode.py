"""Frames by number, from any key frame, exactly."""

import io

import av
import numpy as np
import pytest

from vswin_dist.data.decode import count_frames, decode_frames
from vswin_dist.errors import DataError


def video(frames: int, gop: int = 12, bframes: int = 2, container: str = "mp4") -> bytes:
    """A clip whose frame number is its brightness: frame i is gray 8 * i."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as c:
        stream = c.add_stream("libx264", rate=25, options={"g": str(gop), "bf": str(bframes), "crf": "10"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            c.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * i, np.uint8), format="rgb24")))
        c.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("indices", [[0], [29], [13, 14, 15], [25, 3, 3, 17], list(range(30))])
def test_frames_come_by_their_number(indices: list[int], container: str) -> None:
    frames = decode_frames(video(30, bframes=0 if container == "avi" else 2, container=container), indices, 30, "v")
    assert frames.shape == (len(indices), 32, 32, 3) and frames.dtype == np.uint8
    assert np.abs(frames.mean((1, 2, 3)) - 8 * np.array(indices)).max() < 3


def test_bad_files_are_named() -> None:
    with pytest.raises(DataError, match="clip7"):
        decode_frames(b"no video at all", [0], 1, "clip7")
    with pytest.raises(DataError, match="clip8"):
        count_frames(video(10)[:300], "clip8")
    with pytest.raises(DataError, match=r"frames 0\.\.12 asked for, it has 10"):
        decode_frames(video(10), [0, 12], 10, "clip9")


def test_a_manifest_that_promises_too_many_frames_is_an_error() -> None:
    with pytest.raises(DataError, match="frame 11 of 12 does not decode"):
        decode_frames(video(10), [1, 11], 12, "clip")


def test_frames_are_counted() -> None:
    assert count_frames(video(17), "v") == 17
