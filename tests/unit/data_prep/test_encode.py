"""What the profiles make of a video: size, key frames, time, sound, orientation, and the same bytes every time."""

from __future__ import annotations

import io
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.video.frame import PictureType

from data_prep.encode import process, target_size, verify
from data_prep.settings import Encoding
from tests.unit.data.test_decode import MATRICES, shown_by, turned
from tests.unit.data_prep.videos import make_video, picture
from vswin_dist.data.video.decode import View, decode_views
from vswin_dist.video import Orientation, VideoInfo, orientation

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


@pytest.mark.parametrize(
    ("codec", "pixels", "size"),
    [
        ("libx264", "yuv444p10le", (97, 65)),
        ("libvpx-vp9", "yuv420p", (97, 64)),
        ("mpeg4", "yuv420p", (96, 64)),
        ("libx265", "yuv420p10le", (96, 66)),
    ],
)
def test_other_codecs_depths_and_odd_sizes_come_out_as_8_bit_h264(
    tmp_path: Path, codec: str, pixels: str, size: tuple[int, int]
) -> None:
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


def times_of(data: bytes) -> list[int]:
    """When the frames are shown, in ms after the first."""
    with av.open(io.BytesIO(data)) as video:
        times = [float(frame.time) for frame in video.decode(video=0)]
    return [round(1000 * (time - times[0])) for time in times]


def test_the_frame_rate_cap(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=60, rate=60)
    outcome, data = process(path.read_bytes(), Encoding(max_fps=15), "a.mp4")
    assert times_of(data) == [round(1000 * i / 15) for i in range(15)]
    assert (outcome.frames, outcome.fps, outcome.duration) == (15, 15, 1)
    assert verify(data, COPY).duration == pytest.approx(1.0, abs=0.1)
    slow = make_video(tmp_path / "b.mp4", frames=10, rate=10)
    assert process(slow.read_bytes(), Encoding(max_fps=15), "b.mp4")[0].frames == 10


# ms; what of it a cap of 30 a second leaves
PAUSES = [1000 * i + t for i in range(15) for t in (0, 34, 100, 400)]  # 60 frames at 4.8 a second, as browsers record
BURSTS = [round(3000 * i + 1000 * n / 60) for i in range(3) for n in range(31)]  # 60 a second for half a second each
CAPPED = {
    "slower": (PAUSES, PAUSES),
    "rounded": ([round(1000 * i / 30) for i in range(60)],) * 2,
    "bursts": (BURSTS, [time for i, time in enumerate(BURSTS) if i % 31 % 2 == 0]),
    "a little faster": ([32 * i for i in range(90)], None),
    "at once": ([*range(8), *range(40, 48), 90], [0, 40, 90]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CAPPED)
def test_a_cap_drops_what_follows_too_soon_and_adds_nothing(tmp_path: Path, kind: str) -> None:
    times, wanted = CAPPED[kind]
    path = make_video(tmp_path / "a.webm", frames=len(times), times=times, rate=1000, codec="libvpx")
    outcome, data = process(path.read_bytes(), Encoding(max_fps=30), "a.webm")
    left = times_of(data)
    assert wanted is None or left == wanted
    assert outcome.frames == len(left) and set(left) <= set(times)
    assert outcome.fps == pytest.approx(1000 * (len(left) - 1) / left[-1], abs=0.002) and outcome.fps < 30.1
    assert min(later - time for time, later in pairwise(left)) >= 30
    for start in left:
        assert sum(start <= time < start + 1000 for time in left) <= 31


def test_a_cap_just_below_the_rate_drops_but_a_few(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=300, rate=30)
    assert process(path.read_bytes(), Encoding(max_fps=29.97), "a.mp4")[0].frames in (298, 299, 300)


def test_what_a_cap_leaves_too_little_of_is_too_short(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.mkv", frames=9, times=[*range(0, 450, 50)]).read_bytes()
    outcome, encoded = process(data, Encoding(max_fps=2), "a.mkv")
    assert (outcome.verdict, encoded) == ("too_short", b"")
    assert outcome.detail == "1 of 9 frames are left at 2 a second; at least 2 are asked for"
    assert process(data, Encoding(max_fps=2, min_frames=1), "a.mkv")[0].frames == 1


@pytest.mark.parametrize(("name", "codec"), [("a.h264", "libx264"), ("a.hevc", "libx265")])
def test_streams_without_times_have_those_of_their_rate(tmp_path: Path, name: str, codec: str) -> None:
    data = make_video(tmp_path / name, frames=60, rate=30, codec=codec).read_bytes()
    with av.open(io.BytesIO(data)) as video:
        assert {frame.pts for frame in video.decode(video=0)} == {None}
    for encoding, rate in ((COPY, 30), (Encoding(), 30), (Encoding(max_fps=15), 15), (Encoding(max_fps=10), 10)):
        outcome, encoded = process(data, encoding, name)
        assert (outcome.frames, outcome.fps, outcome.duration) == (2 * rate, rate, 2)
        if encoding.transcodes:
            assert times_of(encoded) == [round(1000 * i / rate) for i in range(2 * rate)]


def test_the_clock_goes_on_where_recordings_are_joined(tmp_path: Path) -> None:
    joined = b"".join(
        make_video(tmp_path / f"{i}.ts", frames=20, codec="mpeg2video", rate=25, seed=i).read_bytes() for i in range(2)
    )
    outcome, data = process(joined, Encoding(), "c.ts")
    assert (outcome.frames, outcome.fps, outcome.duration) == (40, 25, 1.6)
    assert times_of(data) == [40 * i for i in range(40)]


@pytest.mark.parametrize("profile", ["train", "archive", "copy"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_profile_shows_the_picture_as_players_do(tmp_path: Path, matrix: tuple[int, ...], profile: str) -> None:
    path = make_video(tmp_path / "a.mp4", frames=6, size=(96, 64), seed=1)
    outcome, data = process(turned(path.read_bytes(), matrix), Encoding(profile=profile), "a.mp4")
    wanted = shown_by(matrix, picture(0, 96, 64, 1))
    height, width = wanted.shape[:2]
    assert (outcome.width, outcome.height) == (width, height)
    with av.open(io.BytesIO(data)) as video:
        baked = next(video.decode(video=0))
    if profile != "copy":
        assert orientation(baked) == Orientation()
        assert np.abs(baked.to_ndarray(format="rgb24").astype(float) - wanted).mean() < 20
    views = [View(np.array([0]), (0, 0, height, width))]
    clip = decode_views(data, views, VideoInfo(6, width, height, "a"), size=64)[0, :, 0]
    square = F.interpolate(
        torch.from_numpy(wanted).permute(2, 0, 1)[None].float(), (64, 64), mode="bilinear", antialias=True
    )
    assert (clip - square[0]).abs().mean() < 20


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


@pytest.mark.slow
def test_many_encodings_of_one_video_are_the_same_bytes(tmp_path: Path) -> None:
    videos = [make_video(tmp_path / f"{i}.mp4", frames=12, seed=200 + i).read_bytes() for i in range(5)]
    rounds = {tuple(process(v, Encoding(), "a.mp4")[0].crc32 for v in videos) for _ in range(30)}
    assert len(rounds) == 1
