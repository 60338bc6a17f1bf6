"""The report's pictures of a video, also where its container's words are no UTF-8 or its data breaks off."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.heap import growth, needs_heap
from tests.unit.data_prep.videos import make_video, picture
from vswin_dist.manifest import Sample
from vswin_dist.pictures import PictureTask, pictures


def task(path: Path, frames: int, count: int = 3) -> PictureTask:
    """`count` pictures of the video at `path`."""
    sample = Sample("a", 0, 0, 0, path.stat().st_size, 0, "mp4", frames, 12.0, frames / 12, 96, 64, path.name)
    return PictureTask(str(path), sample, count, 96)


def shown(made: list[str]) -> list[np.ndarray]:
    """The pixels of JPEGs as `pictures` gives them."""
    files = [base64.b64decode(one.removeprefix("data:image/jpeg;base64,")) for one in made]
    return [next(av.open(io.BytesIO(f), format="mjpeg").decode(video=0)).to_ndarray(format="rgb24") for f in files]


def test_pictures_are_evenly_spaced_frames(tmp_path: Path) -> None:
    made = shown(pictures(task(make_video(tmp_path / "a.mp4", frames=24), 24)))
    assert len(made) == 3
    for number, pixels in zip((4, 12, 20), made, strict=True):
        near = [np.abs(pixels.astype(float) - picture(i, 96, 64, 0)).mean() for i in range(24)]
        assert int(np.argmin(near)) == number


def test_words_that_are_not_utf_8_are_no_hindrance(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", frames=12, codec="mpeg4")
    data = path.read_bytes()
    assert data.count(b"Lavf") == 1
    path.write_bytes(data.replace(b"Lavf", b"\xd3avf"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert len(pictures(task(path, 12))) == 3


def test_a_video_that_breaks_off_gives_those_before_and_one_that_is_none_nothing(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=48, codec="mpeg4", options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 8 // 10])
    assert len(pictures(task(path, 48))) == 2
    path.write_bytes(b"not a video")
    assert pictures(task(path, 24)) == []


@needs_heap
def test_what_is_not_shown_is_not_kept(tmp_path: Path) -> None:
    one = task(make_video(tmp_path / "a.mp4", frames=24), 24, count=1)
    assert growth(lambda: pictures(one), calls=20) < 50, "an AVPacket alone has 104 bytes"
