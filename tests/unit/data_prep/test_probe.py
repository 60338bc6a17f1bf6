"""Every line of the decision table, and the facts of videos that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.encode import process, verify
from data_prep.probe import KEPT, Rejected, extension
from data_prep.settings import Encoding
from tests.unit.data_prep.videos import make_sound, make_video

COPY = Encoding(profile="copy")


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
    for share in (0.5, 0.8, 0.98):
        cut.write_bytes(whole[:int(len(whole) * share)])
        assert verdict(cut) == "truncated", share
        assert verdict(cut, Encoding()) == "truncated", share


def test_truncated_mp4_without_its_index_is_unreadable(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "a.mp4").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[:len(whole) // 2])
    assert verdict(cut) == "unreadable"


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.webm"])
def test_truncated_in_other_containers(tmp_path: Path, name: str) -> None:
    codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    whole = make_video(tmp_path / name, frames=48, codec=codec).read_bytes()
    assert verdict(tmp_path / name) == KEPT
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes(whole[:len(whole) * 4 // 5])
    assert verdict(cut) == "truncated"


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
