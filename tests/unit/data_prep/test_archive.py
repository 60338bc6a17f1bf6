"""Archives as streams: whole ones from anywhere, broken ones told, and names that are no text."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import archive
from tests.unit.data_prep.test_sources import tar_of
from vswin_dist.errors import WorkFailed

FILES = [(f"v/{n}.mp4", os.urandom(3000 + 700 * n)) for n in range(6)]


def read(*paths: Path | str) -> list[tuple[str, bytes]]:
    return [(m.name, m.data) for m in archive.members([str(p) for p in paths], lambda _: True)]


def test_plain_and_compressed_also_in_several_gzip_members_with_padding(tmp_path: Path) -> None:
    plain = tar_of(tmp_path / "a.tar", FILES)
    assert read(plain) == read(tar_of(tmp_path / "a.tar.gz", FILES)) == FILES
    whole = plain.read_bytes()
    pieces = [whole[:700], whole[700:9000], whole[9000:]]  # as pigz and bgzip write them
    several = tmp_path / "b.tar.gz"
    several.write_bytes(b"".join(gzip.compress(p) for p in pieces) + bytes(100))
    assert read(several) == FILES
    data = several.read_bytes()
    for n in range(4):
        (tmp_path / str(n)).write_bytes(data[n * 5000 : (n + 1) * 5000 if n < 3 else None])
    assert read(*(tmp_path / str(n) for n in range(4))) == FILES


def test_an_archive_that_breaks_off_anywhere_is_told(tmp_path: Path) -> None:
    plain, packed = tar_of(tmp_path / "a.tar", FILES), tar_of(tmp_path / "a.tar.gz", FILES)
    with tarfile.open(plain) as tar:
        third = tar.getmembers()[2]
    cut = tmp_path / "cut.tar"
    for at in (100, third.offset, third.offset + 200, third.offset_data, third.offset_data + 1000, 0):
        cut.write_bytes(plain.read_bytes()[:at])
        with pytest.raises(WorkFailed, match=r"cut\.tar is damaged"):
            read(cut)
        cut.write_bytes(gzip.compress(plain.read_bytes()[:at]))  # whole to gzip, as where tar was killed in a pipe
        with pytest.raises(WorkFailed, match=r"cut\.tar is damaged"):
            read(cut)
    for at in (15, len(packed.read_bytes()) // 2, -1):
        cut.write_bytes(packed.read_bytes()[:at])
        with pytest.raises(WorkFailed, match=r"cut\.tar is damaged"):
            read(cut)


def test_a_changed_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(tar_of(tmp_path / "a.tar", FILES).read_bytes(), compresslevel=0))
    data[4000] ^= 1  # within a video's bytes, which are stored as they are
    (tmp_path / "b.tar.gz").write_bytes(data)
    with pytest.raises(WorkFailed, match="may be wrong"):
        read(tmp_path / "b.tar.gz")


def test_a_name_that_is_no_text_becomes_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(os.fsdecode(b"a\xff.mp4")))
    assert read(tmp_path / "a.tar") == [("a\\xff.mp4", b"")]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server over `tmp_path` that knows no ranges."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            with contextlib.suppress(OSError):  # the reader went away
                super().__init__(*arguments, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_reading_goes_on_where_a_web_server_without_ranges_broke_off(tmp_path: Path, web: str) -> None:
    data = os.urandom(7 << 20)  # more than one block of fsspec
    (tmp_path / "a.tar").write_bytes(data)
    reader = archive.JoinedReader([f"{web}/a.tar"])
    got = reader.read(1000)
    while len(got) < 6 << 20:
        got += reader.read()
    reader.close()  # as after a read that failed
    while more := reader.read():
        got += more
    assert got == data
