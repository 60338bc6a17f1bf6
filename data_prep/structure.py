"""What the structure of a container says of where its file should end.

A header may say more than there is and the file be whole: AVI counts frames that were skipped, a browser the time for
which it recorded a picture that stood still. That a file was cut off shows in the sizes and positions that it states.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

# IDs of Matroska's elements (RFC 9559, 5.1), and where in an index the positions of others stand, as the segment counts
_SEGMENT, _SEEK_HEAD, _CUES = 0x18538067, 0x114D9B74, 0x1C53BB6B
_PACKETS = {0x1F43B675: "a cluster", 0xA0: "a block", 0xA3: "a block"}
_POSITIONS = {_SEEK_HEAD: (0x4DBB, 0x53AC), _CUES: (0xBB, 0xB7, 0xF1)}


def breaks_off(data: bytes, container: str, indexed: int) -> str:
    """Say by what a file is seen to be cut off; "" where it ends as it says, or its container is not known here.

    Args:
        container: FFmpeg's name of it.
        indexed: where the last packet ends by FFmpeg's index, bytes.
    """
    if indexed > len(data):
        return _beyond("the index", indexed, data)
    readers = {"avi": _riff, "mov": _boxes, "matroska": _matroska}
    reader = readers.get(container.split(",")[0])
    return reader(data) if reader else ""


def loses_packets(data: bytes, container: str) -> str:
    """Say by what Matroska is seen to end within a packet, which FFmpeg leaves out without a word; "" elsewhere."""
    if container.startswith("matroska"):
        for kind, _, stop in _elements(data, 0, len(data)):
            if kind in _PACKETS and stop > len(data):
                return _beyond(_PACKETS[kind], stop, data)
    return ""


def _riff(data: bytes) -> str:
    at = 0
    while data[at : at + 4] == b"RIFF" and at + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        at += 8 + size
        if at > len(data):
            return _beyond("the RIFF chunk", at, data)
        at += size % 2
    return ""


def _boxes(data: bytes) -> str:
    """ISO/IEC 14496-12, 4.2 and 8.8.9: fragments have an index after the last of them."""
    at, kinds = 0, set()
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        kinds.add(kind)
        if size == 1 and at + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, at + 8)
        if size < 8:  # 0: to the end of the file
            break
        at += size
    if at > len(data):
        return _beyond("a box", at, data)
    return "no index follows its fragments" if b"moof" in kinds and b"mfra" not in kinds else ""


def _matroska(data: bytes) -> str:
    segment = 0
    for kind, start, stop in _elements(data, 0, len(data)):
        if stop > len(data):
            return _beyond("the segment" if kind == _SEGMENT else _PACKETS.get(kind, "an element"), stop, data)
        if kind == _SEGMENT:
            segment = start
        for position in _numbers(data, start, stop, _POSITIONS.get(kind, ())):
            if segment + position >= len(data):
                return _beyond("an index", segment + position + 1, data)
    return ""


def _elements(data: bytes, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """ID, start and stop of the content of each element (RFC 8794).

    Those in an element of unknown size follow it, and so do those in a segment that the file does not hold completely;
    after one that it does, what comes is no video.
    """
    while at < stop and data[at]:
        size_at = at + _length(data[at])
        if size_at >= stop or not data[size_at]:
            return
        start = size_at + _length(data[size_at])
        bits = 7 * (start - size_at)
        size = int.from_bytes(data[size_at:start], "big") & ((1 << bits) - 1)
        kind, end = int.from_bytes(data[at:size_at], "big"), start + size * (size != (1 << bits) - 1)
        yield kind, start, end
        if kind == _SEGMENT and start < end <= stop:
            return
        at = start if kind == _SEGMENT else end


def _length(first: int) -> int:
    """Bytes of a number, by its first one."""
    return 9 - first.bit_length()


def _numbers(data: bytes, start: int, stop: int, path: tuple[int, ...]) -> Iterator[int]:
    """Give the numbers in elements that lie within one another as `path` says."""
    for kind, inner, end in _elements(data, start, stop) if path else ():
        if kind == path[0] and len(path) == 1:
            yield int.from_bytes(data[inner:end], "big")
        elif kind == path[0]:
            yield from _numbers(data, inner, end, path[1:])


def _beyond(what: str, stop: int, data: bytes) -> str:
    return f"{what} reaches to byte {stop}, the file has {len(data)}"
