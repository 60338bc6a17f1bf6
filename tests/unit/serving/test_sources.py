"""Videos by path, by URL, as bytes and as base64."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.serving.sources import LONGEST_PATH, name_of, read_video


def test_every_way_gives_the_bytes_of_the_file(video: str, tmp_path: Path) -> None:
    content = Path(video).read_bytes()
    url = f"memory://videos/{tmp_path.name}.mp4"
    storage.put_bytes(url, content)
    text = base64.b64encode(content).decode()
    assert len(text) > LONGEST_PATH
    for named in (video, f"file://{video}", url):
        assert read_video(named) == content and name_of(named) == named
    for unnamed in (content, text, base64.encodebytes(content).decode(), f"data:video/mp4;base64,{text}", "data:,"):
        assert read_video(unnamed) == (content if unnamed != "data:," else b"") and name_of(unnamed) is None


@pytest.mark.parametrize("video", ["", None, 3.5])
def test_what_names_no_video_is_refused(video: object) -> None:
    with pytest.raises(DataError, match=r"^no video: "):
        read_video(video)


def test_what_is_no_base64_is_refused() -> None:
    for text in ("data:video/mp4;base64,a?b", "?" * (LONGEST_PATH + 1), "data:video/mp4;base64,AAé="):
        with pytest.raises(DataError, match=r"^the video is no base64"):
            read_video(text)
