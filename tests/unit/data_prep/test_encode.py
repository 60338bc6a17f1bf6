"""What the profiles make of a video: size, key frames, time, sound, orientation, and the same bytes every time."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from data_prep.encode import process, target_size, verify
from data_prep.settings import Encoding
from tests.unit.data_prep.videos import make_video, picture

COPY = Encoding(profile="copy")


def made(path: Path, encoding: Encoding) -> bytes:
    outcome, data = process(path.read_bytes(), encoding, path.name)
    assert outcome.kept, outcome
    assert (outcome.size, outcome.extension) == (len(data), "mp4")
    again = verify(data, COPY)
    assert (again.frames, again.width, again.height) == (outcome.frames, outcome.width, outcome.height)
    assert again.duration == pytest.approx(outcome.duration, abs=0.02)
    return data


def test_target_size_never_grows_and_is_even() -> None:
    assert target_size((640, 360), Encoding()) == (456, 256)
    assert target_size((360, 640), Encoding()) == (256, 456)
    assert target_size((321, 241), Encoding()) == (320, 240)
    assert target_size((320, 240), Encoding(short_side=120)) == (160, 120)
    assert target_size((641, 361), Encoding(profile="archive")) == (640, 360)


def test_key_frames_stand_at_the_interval_and_nowhere_else(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", frames=40, codec="mpeg4")  # has its own at 0, 12, 24, 36
    with av.open(io.BytesIO(made(path, Encoding(keyframe_interval=8)))) as video:
        frames = list(video.decode(video=0))
        assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 8, 16, 24, 32]
        assert [i for i, frame in enumerate(frames) if frame.pict_type == PictureType.I] == [0, 8, 16, 24, 32]
        context: Any = video.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_the_same_bytes_every_time_and_the_picture_is_kept(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=20, size=(192, 128), seed=3)
    first = made(path, Encoding(short_side=128))
    assert first == made(path, Encoding(short_side=128))
    with av.open(io.BytesIO(first)) as video:
        frames = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
    for i in (0, 10, 19):
        wanted = picture(i, 192, 128, 3).astype(float)
        assert np.abs(frames[i] - wanted).mean() < 12
        assert np.abs(frames[i] - picture(i + 4, 192, 128, 3).astype(float)).mean() > np.abs(frames[i] - wanted).mean()


@pytest.mark.parametrize(("codec", "pixels", "size"), [
    ("libx264", "yuv444p10le", (97, 65)), ("libvpx-vp9", "yuv420p", (97, 64)), ("mpeg4", "yuv420p", (96, 64)),
    ("libx265", "yuv420p10le", (96, 66))])
def test_other_codecs_depths_and_odd_sizes_come_out_as_8_bit_h264(
        tmp_path: Path, codec: str, pixels: str, size: tuple[int, int]) -> None:
    path = make_video(tmp_path / "a.mkv", frames=10, codec=codec, pixels=pixels, size=size)
    with av.open(io.BytesIO(made(path, Encoding()))) as video:
        context: Any = video.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.width, context.height) == tuple(n // 2 * 2 for n in size)


def test_variable_frame_rate_and_a_late_start_keep_their_times(tmp_path: Path) -> None:
    times = [5000, 5040, 5080, 5300, 5340, 6000, 6040, 6080]
    path = make_video(tmp_path / "a.mkv", frames=8, times=times)
    with av.open(io.BytesIO(made(path, Encoding()))) as video:
        seen = [float(f.time) for f in video.decode(video=0)]
    assert seen == pytest.approx([(t - times[0]) / 1000 for t in times], abs=0.002)


def test_the_frame_rate_cap(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=60, rate=60)
    outcome, data = process(path.read_bytes(), Encoding(max_fps=15), "a.mp4")
    assert outcome.frames == verify(data, COPY).frames == pytest.approx(15, abs=1)
    assert verify(data, COPY).duration == pytest.approx(1.0, abs=0.1)
    slow = make_video(tmp_path / "b.mp4", frames=10, rate=10)
    assert process(slow.read_bytes(), Encoding(max_fps=15), "b.mp4")[0].frames == 10


def test_rotation_is_applied(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=6, size=(96, 64), seed=1)
    data = bytearray(path.read_bytes())
    # The display matrix of the track header: a quarter turn clockwise, as phones write it.
    unit = (1 << 16).to_bytes(4, "big")
    identity = unit + bytes(12) + unit + bytes(12) + (1 << 30).to_bytes(4, "big")
    turned = (bytes(4) + unit + bytes(4) + (-(1 << 16)).to_bytes(4, "big", signed=True) + bytes(16)
              + (1 << 30).to_bytes(4, "big"))
    at = data.rfind(identity)  # the movie header holds one too, before it
    assert at > 0 and len(turned) == len(identity) == 36
    data[at:at + 36] = turned
    outcome, encoded = process(bytes(data), Encoding(), "a.mp4")
    assert (outcome.width, outcome.height) == (64, 96)
    with av.open(io.BytesIO(encoded)) as video:
        first = next(video.decode(video=0))
    assert first.rotation == 0
    wanted = np.rot90(picture(0, 96, 64, 1), k=-1)
    assert np.abs(first.to_ndarray(format="rgb24").astype(float) - wanted).mean() < 20
    assert verify(bytes(data), COPY).width == 64  # copy keeps the bytes and states the size as displayed


def test_copy_keeps_the_bytes(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.avi", codec="mpeg4")
    data = path.read_bytes()
    outcome, kept = process(data, COPY, "a.avi")
    assert kept is data
    assert (outcome.extension, outcome.size, outcome.fps) == ("avi", len(data), pytest.approx(12))


def test_a_change_of_size_within_the_video_is_scaled_to_the_first(tmp_path: Path) -> None:
    small = make_video(tmp_path / "a.ts", frames=10, size=(96, 64), codec="mpeg2video", rate=25)
    large = make_video(tmp_path / "b.ts", frames=10, size=(192, 128), codec="mpeg2video", rate=25)
    outcome, data = process(small.read_bytes() + large.read_bytes(), Encoding(), "c.ts")
    assert outcome.kept and (outcome.width, outcome.height) == (96, 64)
    with av.open(io.BytesIO(data)) as video:
        assert {(f.width, f.height) for f in video.decode(video=0)} == {(96, 64)}
        assert Fraction(video.streams.video[0].average_rate or 0) > 0


def test_many_encodings_of_one_video_are_the_same_bytes(tmp_path: Path) -> None:
    videos = [make_video(tmp_path / f"{i}.mp4", frames=12, seed=200 + i).read_bytes() for i in range(5)]
    rounds = {tuple(process(v, Encoding(), "a.mp4")[0].crc32 for v in videos) for _ in range(30)}
    assert len(rounds) == 1
