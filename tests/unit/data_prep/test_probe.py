"""Every line of the decision table, and the facts of videos that are kept."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import av
import pytest

from data_prep.encode import process, verify
from data_prep.probe import KEPT, Rejected, extension
from data_prep.settings import Encoding
from tests.unit.data_prep.videos import make_sound, make_video

COPY = Encoding(profile="copy")
SEGMENT, INFO, CLUSTER, CUES = (bytes.fromhex(i) for i in ("18538067", "1549a966", "1f43b675", "1c53bb6b"))  # RFC 9559


def verdict(path: Path, encoding: Encoding = COPY) -> str:
    return process(path.read_bytes(), encoding, path.name)[0].verdict


def test_a_sound_video_is_kept_with_its_facts(tmp_path: Path) -> None:
    facts = verify(make_video(tmp_path / "a.mp4", frames=24, rate=12).read_bytes(), COPY, "a.mp4")
    assert (facts.frames, facts.width, facts.height, facts.extension) == (24, 96, 64, "mp4")
    assert facts.fps == pytest.approx(12) and facts.duration == pytest.approx(2.0)


def test_unreadable(tmp_path: Path) -> None:
    text, empty = tmp_path / "a.mp4", tmp_path / "b.mp4"
    text.write_text("no video")
    empty.write_bytes(b"")
    assert verdict(text) == verdict(empty) == "unreadable"


def test_truncated_mp4_with_its_index_in_front(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4", frames=60, options={"movflags": "faststart"}).read_bytes()
    cut = tmp_path / "cut.mp4"
    for fraction in (0.5, 0.8, 0.98):
        cut.write_bytes(whole[: int(len(whole) * fraction)])
        assert verdict(cut) == "truncated", fraction
        assert verdict(cut, Encoding()) == "truncated", fraction


def test_truncated_mp4_without_its_index_is_unreadable(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    assert verdict(cut) == "unreadable"


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.webm"])
def test_truncated_in_other_containers(tmp_path: Path, name: str) -> None:
    codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    whole = make_video(tmp_path / name, frames=48, codec=codec).read_bytes()
    assert verdict(tmp_path / name) == KEPT
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(whole[: len(whole) * 4 // 5])
    assert verdict(cut) == "truncated"


def skipping_avi(path: Path) -> bytes:
    """20 frames, each followed by four that are skipped: the header counts them."""
    return make_video(
        path, frames=20, codec="mjpeg", pixels="yuvj420p", rate=25, times=[200 * i for i in range(20)]
    ).read_bytes()


def resized(data: bytes, kind: bytes, size: int | None) -> bytes:
    """Matroska with another size of its last element `kind`, or an unknown one, in as many bytes (RFC 8794, 4 and 6.2)."""
    at = data.rindex(kind) + len(kind)
    length = 9 - data[at].bit_length()
    content = (1 << 7 * length) - 1 if size is None else size
    return data[:at] + (content | 1 << 7 * length).to_bytes(length, "big") + data[at + length :]


def recorded(path: Path, streamed: bool) -> bytes:
    """A webm of 48 frames in 4 s whose header says 20 s, as of a picture that stands still; or as browsers stream it."""
    duration = b"\x44\x89\x88" + struct.pack(">d", 20_000)  # RFC 9559, 5.1.2.10, in ms
    if not streamed:
        data = make_video(path, frames=48, codec="libvpx").read_bytes()
        return re.sub(rb"\x44\x89\x88.{8}", duration, data, count=1, flags=re.DOTALL)
    data = make_video(path, frames=48, codec="libvpx", options={"live": "1"}).read_bytes()
    data = data.replace(b"\x11\x4d\x9b\x74\xab", b"\xec\x10\x00\x00\x2b")  # an index that the longer header makes wrong
    at = data.rindex(INFO) + 4
    assert 0x80 < data[at] < 0xF0, "one byte says its size"
    data = resized(data[: at + 1] + duration + data[at + 1 :], INFO, (data[at] & 0x7F) + len(duration))
    head, *clusters = data.split(CLUSTER)
    return head + b"".join(resized(CLUSTER + cluster, CLUSTER, None) for cluster in clusters)


@pytest.mark.parametrize("kind", ["avi", "webm", "streamed webm"])
def test_a_header_that_says_more_than_there_is_is_no_cut(tmp_path: Path, kind: str) -> None:
    data = {
        "avi": lambda: skipping_avi(tmp_path / "a.avi"),
        "webm": lambda: recorded(tmp_path / "a.webm", streamed=False),
        "streamed webm": lambda: recorded(tmp_path / "a.webm", streamed=True),
    }[kind]()
    with av.open(io.BytesIO(data)) as video:
        stream = video.streams.video[0]
        assert stream.frames > 90 if kind == "avi" else video.duration == 20_000_000
        packets = [(packet.pos, packet.size) for packet in video.demux(stream) if packet.size]
    frames = {"avi": 20}.get(kind, 48)
    assert verify(data, COPY, f"a.{kind}").frames == len(packets) == frames
    for number in (2, frames // 2, frames - 3):
        for middle in (packets[number][1] // 2, packets[number][1] - 1):
            outcome, _ = process(data[: packets[number][0] + middle], COPY, "a")
            assert outcome.verdict == "truncated", (number, outcome)
    if kind != "streamed webm":  # where that one ends between packets, nothing says that there were more
        assert process(data[: packets[frames // 2][0]], COPY, "a")[0].verdict == "truncated"


def test_a_streamed_webm_is_cut_where_a_packet_or_its_index_is(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.webm", frames=48, codec="libvpx", options={"live": "1"}).read_bytes()
    assert process(data, COPY, "a.webm")[0].frames == 48
    for fraction in (0.3, 0.6, 0.97):
        assert process(data[: int(len(data) * fraction)], COPY, "a.webm")[0].verdict == "truncated", fraction
    indexed = recorded(tmp_path / "b.webm", streamed=False)
    indexed = resized(indexed, SEGMENT, None)
    assert process(indexed, COPY, "b.webm")[0].frames == 48
    outcome, _ = process(indexed[: indexed.rindex(CUES)], COPY, "b.webm")  # which its first index names
    assert outcome.verdict == "truncated" and "an index reaches to byte" in outcome.detail


def test_an_mp4_that_is_cut_between_packets_is_found_by_its_index(tmp_path: Path) -> None:
    data = make_video(tmp_path / "a.mp4", frames=60, options={"movflags": "faststart"}).read_bytes()
    with av.open(io.BytesIO(data)) as video:
        end = [packet.pos for packet in video.demux(video=0) if packet.size][20]
    at = data.index(b"mdat") - 4
    whole, to_the_end = (end - at).to_bytes(4, "big"), bytes(4)  # as the box's size
    assert process(data[:at] + to_the_end + data[at + 4 :], COPY, "a.mp4")[0].frames == 60
    for size in (whole, to_the_end):
        outcome, _ = process(data[:at] + size + data[at + 4 : end], COPY, "a.mp4")
        assert outcome.verdict == "truncated" and "the index reaches to byte" in outcome.detail


def test_no_video_stream(tmp_path: Path) -> None:
    assert verdict(make_sound(tmp_path / "a.mp4")) == "no_video_stream"


def test_too_short_and_too_small(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=6, size=(96, 64))
    assert verdict(path, Encoding(profile="copy", min_frames=7)) == "too_short"
    assert verdict(path, Encoding(profile="copy", min_side=65)) == "too_small"
    assert verdict(path, Encoding(profile="copy", min_frames=6, min_side=64)) == KEPT


def test_damaged_packets_count_against_the_bound(tmp_path: Path) -> None:
    data = bytearray(make_video(tmp_path / "a.mp4", frames=60, size=(192, 128)).read_bytes())
    start = data.find(b"mdat")
    for i in range(start + 2000, start + (len(data) - start) // 2, 97):
        data[i] ^= 0x5A
    with pytest.raises(Rejected) as caught:
        verify(bytes(data), COPY)
    assert caught.value.reason == "decode_errors"
    assert verify(bytes(data), Encoding(profile="copy", max_bad=1.0)).frames > 30


def test_the_extension_is_the_containers() -> None:
    assert extension("mov,mp4,m4a,3gp,3g2,mj2", "clip.mov") == "mov"
    assert extension("mov,mp4,m4a,3gp,3g2,mj2", "clip.avi") == "mp4"
    assert extension("matroska,webm", "clip.webm") == "webm"
    assert extension("matroska,webm", "clip.mp4") == "mkv"
    assert extension("avi", "clip.mp4") == "avi"
