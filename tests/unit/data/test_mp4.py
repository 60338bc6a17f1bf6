"""Frames by an mp4's tables are, bit for bit, those of FFmpeg's demuxer; what is not known exactly is left to it."""

from __future__ import annotations

import io
import itertools
import os
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.unit.data.test_decode import picture, turned, write
from vswin_dist.data.shard_reader import Members
from vswin_dist.data.video import decode, mp4
from vswin_dist.errors import DataError
from vswin_dist.manifest import read_manifest
from vswin_dist.video import VideoInfo

REAL = Path(os.environ.get("VSWIN_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data") / "odd_videos"
FRAMES = 40


def plain(codec: str = "libx264", **options: Any) -> bytes:
    return write((picture(64, 48, 3 * i) for i in range(FRAMES)), (64, 48), codec, **{"g": "12", **options})


def look(frame: av.VideoFrame) -> tuple[Any, ...]:
    """All of a frame that the clip made of it depends on."""
    return (
        frame.width,
        frame.height,
        frame.format.name,
        frame.colorspace,
        frame.color_range,
        frame.rotation,
        [(p.line_size, bytes(p)) for p in frame.planes],
    )


def same_as_demuxed(data: bytes, frames: int) -> None:
    """By the tables, all frames and some of them look as those that a plain decode gives."""
    found = mp4.read(data)
    assert found is not None and len(found.sizes) == frames
    with av.open(io.BytesIO(data)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert found.sizes.tolist() == [p.size for p in packets] and found.offsets.tolist() == [p.pos for p in packets]
    assert found.keys.tolist() == [i for i, p in enumerate(packets) if p.is_keyframe]
    with av.open(io.BytesIO(data)) as container:
        whole = [look(frame) for frame in container.decode(video=0)]
    rng = np.random.default_rng(0)
    for wanted in (range(frames), rng.choice(frames, 5), (rng.integers(frames) + 2 * np.arange(6)) % frames):
        made = {number: look(frame) for number, frame in decode._by_tables(found, {int(i) for i in wanted})}
        assert made == {int(i): whole[int(i)] for i in wanted}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf": "0"},
        {"bf": "3", "b-pyramid": "normal", "x264-params": "b-adapt=0"},
        {"matrix": "bt709"},
        {"full": True},
        {"bf": "3", "x264-params": "open-gop=1:b-adapt=0"},
        {"g": "1"},
        {"tune": "fastdecode"},
    ],
    ids=str,
)
def test_frames_are_those_of_the_demuxer(options: dict[str, Any]) -> None:
    same_as_demuxed(plain(**options), FRAMES)


def test_colours_that_the_container_alone_tells_reach_the_frames() -> None:
    out, colr = io.BytesIO(), b"\0\0\0\x13colrnclx" + struct.pack(">HHHB", 1, 1, 9, 128)
    with av.open(out, "w", format="mp4") as c:
        stream: Any = c.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(4):
            c.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((72, 64), 40 * i, np.uint8), format="yuv420p")))
        c.mux(stream.encode())
    data = bytearray(out.getvalue())
    at = data.rindex(b"btrt") - 4
    data[at:at] = colr
    for around in (b"avc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        at = data.rindex(around) - 4
        data[at : at + 4] = struct.pack(">I", struct.unpack_from(">I", data, at)[0] + len(colr))
    found = mp4.read(bytes(data))
    assert found is not None
    frame = next(frame for _, frame in decode._by_tables(found, {2}))
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (9, 2, 1, 1)
    same_as_demuxed(bytes(data), 4)


def test_packed_shards_are_known(motion_shards: Path) -> None:
    manifest = read_manifest(str(motion_shards / "train"))
    members = Members(manifest, str(motion_shards / "train"))
    for number in range(3):
        same_as_demuxed(members.read(number), manifest.samples[number].frames)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real videos: VSWIN_DATA or {REAL}")
def test_odd_videos() -> None:
    known = []
    for path in sorted(REAL.iterdir()):
        data = path.read_bytes()
        found = mp4.read(data)
        if found is not None and path.name not in ("bitflips_mid.mp4", "corrupted.mp4"):  # these do not decode
            same_as_demuxed(data, len(found.sizes))
            known.append(path.name)
    assert known == ["bt601_limited_range.mp4", "five_frames_shorter_than_clip.mp4", "portrait_90x640.mp4"]


PATCHES = {  # where, bytes after the box's name, what is written there
    "a box of a kind that may matter": (b"btrt", -4, b"clap"),
    "another codec": (b"avc1\0", -5, b"hvc1"),
    "fragments": (b"udta", -4, b"mvex"),
    "two descriptions": (b"stsd", 4, b"\0\0\0\2"),
    "samples in another file": (b"url ", 0, b"\0\0\0\0"),
    "a later edit": (b"elst", 15, b"\1"),
    "an edit that ends early": (b"elst", 8, b"\0\0\0\1"),
    "twice as fast": (b"elst", 16, b"\0\2"),
    "a layout of 64 bits": (b"mdhd", 0, b"\1"),
    "a frame twice at a time": (b"ctts", 12, b"\0\0\2\1"),
    "fewer sizes than times": (b"stts", 8, b"\0\0\0\1"),
    "no time between frames": (b"stts", 12, b"\0\0\0\0"),
    "a key frame that is not there": (b"stss", 16, b"\0\0\1\0"),
    "first frame no key": (b"stss", 8, b"\0\0\0\2"),
    "data beyond the end": (b"stco", 8, b"\0\xff\0\0"),
    "a count beyond the table": (b"stsz", 8, b"\0\0\1\0"),
    "a count beyond memory": (b"stts", 8, b"\x7f\xff\xff\xff"),
    "an empty sample": (b"stsz", 12, b"\0\0\0\0"),
    "a box beyond its parent": (b"stbl", -8, b"\0\1\0\0"),
    "a box within itself": (b"stbl", -8, b"\0\0\0\2"),
}


@pytest.mark.parametrize("what", PATCHES)
def test_what_is_not_known_exactly_is_left_to_ffmpeg(what: str) -> None:
    data = plain()
    name, offset, content = PATCHES[what]
    at = data.rindex(name) + 4 + offset
    assert mp4.read(data) is not None
    assert mp4.read(data[:at] + content + data[at + len(content) :]) is None


def test_other_files_are_left_to_ffmpeg() -> None:
    data = plain()
    assert mp4.read(turned(data, (0, 1, -1, 0))) is None
    assert mp4.read(plain("mpeg4")) is None
    assert all(mp4.read(data[:cut]) is None for cut in (0, 4, 30, 1000, len(data) // 2, len(data) - 1))
    assert mp4.read(b"no video at all") is None


def test_a_manifest_of_other_frames_does_not_believe_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_by_tables", lambda *_: pytest.fail("the tables were believed"))
    assert set(dict(decode.wanted_frames(plain(), {3}, FRAMES - 1))) == {3}


def test_frames_that_the_tables_do_not_give_are_counted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data, direct = plain(), decode._by_tables
    monkeypatch.setattr(decode, "_by_tables", lambda video, wanted: itertools.islice(direct(video, wanted), 1))
    made = dict(decode.wanted_frames(data, {5, 30}, FRAMES))
    assert {number: look(frame) for number, frame in made.items()} == {
        number: look(frame) for number, frame in decode._from_start(data) if number in (5, 30)
    }


def test_tables_that_promise_what_does_not_decode_give_nothing() -> None:
    data = bytearray(plain())
    data[data.rindex(b"avcC") + 9] ^= 0xFF  # the number of parameter sets
    found = mp4.read(bytes(data))
    assert found is not None and not dict(decode._by_tables(found, {3}))
    with pytest.raises(DataError, match="v: frame 3 of 40 does not decode"):
        decode.decode_views(
            bytes(data), [decode.View(np.array([3]), (0, 0, 48, 64))], VideoInfo(FRAMES, 64, 48, "v"), size=32
        )
