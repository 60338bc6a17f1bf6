"""The video of a plain mp4 without FFmpeg's demuxer, which opens a file by decoding ahead and reads what no clip needs.

`read` takes what common muxers write of h264: one video track of one description, every sample in this file, no fragments,
and at most the edit that starts the clock at the first frame. Of anything else it makes nothing, and FFmpeg reads it.
Boxes are those of ISO/IEC 14496-12, but for avcC (14496-15).
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Container, Iterator, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

_FILE = {b"ftyp", b"free", b"mdat", b"moov"}  # what may stand in the file, and so on
_MOVIE = {b"mvhd", b"trak", b"udta"}
_TRACK = {b"tkhd", b"edts", b"mdia", b"udta"}
_MEDIA = {b"mdhd", b"hdlr", b"minf"}
_INFORMATION = {b"vmhd", b"dinf", b"stbl"}
_TABLES = {b"stsd", b"stts", b"ctts", b"stss", b"stsc", b"stsz", b"stco", b"co64"}
_DESCRIPTION = {b"avcC", b"btrt", b"pasp", b"colr"}
_IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # a matrix that turns nothing
_ENTRY = 78  # bytes of the description before its boxes
_IN_THIS_FILE = bytes.fromhex("00000000 00000001 0000000c 75726c20 00000001")  # the content of dref
_COLOURS = {1, 2, 4, 5, 6, 7, 9}  # values in colr that mean the same to FFmpeg, whichever field they stand in

Ints = NDArray[np.int64]


class _Unknown(ValueError):
    """The file is not one that is known exactly."""


class _Part(NamedTuple):
    """Where the content of a box lies in the file."""

    start: int
    stop: int


_Boxes = dict[bytes, list[_Part]]


@dataclass(frozen=True)
class Mp4Tables:
    """An h264 track of N samples, each a frame, in decoding order.

    data: the file. offsets, sizes: of the samples in it, bytes, int64 [N]. numbers: of the frames in presentation order,
    int64 [N]. keys: the samples that are key frames, int64, rising. settings: attributes that FFmpeg's demuxer would give
    the decoder.
    """

    data: bytes
    offsets: Ints
    sizes: Ints
    numbers: Ints
    keys: Ints
    settings: dict[str, Any]

    def decoder(self) -> Any:
        """Return a decoder for the packets, which works in this thread alone."""
        decoder = av.CodecContext.create("h264", "r")
        decoder.thread_type, decoder.thread_count = "NONE", 1
        for name, value in self.settings.items():
            setattr(decoder, name, value)
        return decoder

    def packets(self, start: int, stop: int, wanted: Container[int]) -> Iterator[av.Packet[Any]]:
        """Those of the samples `start` to `stop` that the frames `wanted` need, as packets at the time of their number."""
        data = memoryview(self.data)
        for offset, size, number in zip(
            *(a[start:stop].tolist() for a in (self.offsets, self.sizes, self.numbers)), strict=True
        ):
            if number in wanted or self._is_referred_to(offset, offset + size):
                packet: av.Packet[Any] = av.Packet(size)  # with zeros after it, as decoders need them
                packet.update(data[offset : offset + size])
                packet.pts = number
                yield packet

    def _is_referred_to(self, at: int, stop: int) -> bool:
        """Whether other frames may need the sample at bytes `at` to `stop`: nal_ref_idc of its slices (H.264, 7.4.1)."""
        prefix, slices = (self.settings["extradata"][4] & 3) + 1, 0
        while at + prefix < stop:
            head = self.data[at + prefix]
            if 1 <= head & 31 <= 5:
                slices += 1
                if head & 96:
                    return True
            at += prefix + int.from_bytes(self.data[at : at + prefix], "big")
        return slices == 0


def read(data: bytes) -> Mp4Tables | None:
    """Read the tables of the file `data`; None where it is not an mp4 of the kind that this module knows."""
    try:
        movie = _boxes(data, _one(_boxes(data, _Part(0, len(data)), _FILE), b"moov"), _MOVIE)
        tracks = [track for part in movie[b"trak"] if (track := _video_track(data, part))]
        _check(len(tracks) == 1)
        return _read_track(data, _one(movie, b"mvhd"), tracks[0])
    except (_Unknown, struct.error):
        return None


def _video_track(data: bytes, part: _Part) -> _Boxes | None:
    """Return the boxes of a track and of its media together; None for sound and the like."""
    track = _boxes(data, part)
    media = _boxes(data, _one(track, b"mdia"))
    if _fields(">4s", data, _one(media, b"hdlr"), 4) != (b"vide",):
        return None
    _check(track.keys() <= _TRACK and media.keys() <= _MEDIA)
    return defaultdict(list, {**track, **media})


def _read_track(data: bytes, movie: _Part, track: _Boxes) -> Mp4Tables:
    turned = _fields(">36s", data, _one(track, b"tkhd"), 36), _fields(">36s", data, movie, 32)
    _check(turned == ((_IDENTITY,), (_IDENTITY,)))
    information = _boxes(data, _one(track, b"minf"), _INFORMATION)
    references = _one(_boxes(data, _one(information, b"dinf"), {b"dref"}), b"dref")
    _check(data[references.start : references.stop] == _IN_THIS_FILE)
    tables = _boxes(data, _one(information, b"stbl"), _TABLES)
    offsets, sizes = _extents(data, tables)
    keys, times = _keys(data, tables, len(sizes)), _times(data, tables, len(sizes))
    order = np.argsort(times)
    _check(bool((np.diff(times[order]) > 0).all()) and order[0] == 0)
    if track[b"edts"]:
        _check_edit(data, movie, track, times)
    numbers = np.empty_like(order)
    numbers[order] = np.arange(len(order))
    return Mp4Tables(data, offsets, sizes, numbers, keys, _settings(data, _one(tables, b"stsd")))


def _check_edit(data: bytes, movie: _Part, track: _Boxes, times: Ints) -> None:
    """Tell whether the one edit begins at the first frame and ends after the last."""
    (movie_scale,), (scale,) = _fields(">I", data, movie, 8), _fields(">I", data, _one(track, b"mdhd"), 8)
    edit = _one(_boxes(data, _one(track, b"edts"), {b"elst"}), b"elst")
    count, duration, start, rate = _fields(">IIiI", data, edit)
    _check(
        count == 1
        and rate == 1 << 16
        and start == times[0]
        and movie_scale > 0
        and start + (duration - 1) * scale // movie_scale > times.max()
    )


def _extents(data: bytes, tables: _Boxes) -> tuple[Ints, Ints]:
    """Offsets and sizes of the samples, bytes, int64 [N] each."""
    each = _fields(">I", data, _one(tables, b"stsz"))
    sizes = _table(data, _one(tables, b"stsz"), 1, skip=4)[:, 0]
    wide = bool(tables[b"co64"])
    chunks = _table(data, _one(tables, b"co64" if wide else b"stco"), 1, ">i8" if wide else ">i4")[:, 0]
    first, samples, descriptions = _table(data, _one(tables, b"stsc"), 3).T
    runs = np.diff(np.append(first, len(chunks) + 1))
    _check(each == (0,) and first[0] == 1 and bool((runs > 0).all() and (samples > 0).all() and (descriptions == 1).all()))
    _check(bool((sizes > 0).all()) and int(runs @ samples) == len(sizes))
    counts = np.repeat(samples, runs)  # of each chunk
    before = np.cumsum(sizes) - sizes
    offsets = before + np.repeat(chunks - before[np.cumsum(counts) - counts], counts)
    _check(bool((offsets >= 0).all() and (offsets <= len(data) - sizes).all()))
    return offsets, sizes


def _times(data: bytes, tables: _Boxes, samples: int) -> Ints:
    """When each frame is shown, in units of the track, int64 [N]."""
    steps = _spread(data, _one(tables, b"stts"), samples)
    _check(bool((steps > 0).all()))
    times = steps.cumsum() - steps
    return times + _spread(data, _one(tables, b"ctts"), samples) if tables[b"ctts"] else times


def _spread(data: bytes, part: _Part, samples: int) -> Ints:
    """Return the values of a table of (count, value), one for each sample, int64 [N]."""
    counts, values = _table(data, part, 2).T
    _check(bool((counts > 0).all()) and int(counts.sum()) == samples)
    return np.repeat(values, counts)


def _keys(data: bytes, tables: _Boxes, samples: int) -> Ints:
    """Return the key frames, the first among them; without a table every frame is one."""
    if not tables[b"stss"]:
        return np.arange(samples)
    keys = _table(data, _one(tables, b"stss"), 1)[:, 0] - 1
    _check(keys[0] == 0 and keys[-1] < samples and bool((np.diff(keys) > 0).all()))
    return keys


def _settings(data: bytes, part: _Part) -> dict[str, Any]:
    """Size in pixels, parameter sets and colours from the one description of the track."""
    (count,), entry = _fields(">I", data, part), _one(_boxes(data, _Part(part.start + 8, part.stop), {b"avc1"}), b"avc1")
    reference, width, height = struct.unpack_from(">6xH16xHH", data, entry.start)
    _check(count == 1 and reference == 1)
    more = _boxes(data, _Part(entry.start + _ENTRY, entry.stop), _DESCRIPTION)
    parameters = _one(more, b"avcC")
    _check(parameters.stop - parameters.start > 6)
    settings = {"width": width, "height": height, "extradata": data[parameters.start : parameters.stop]}
    if more[b"colr"]:
        colour = _one(more, b"colr")
        kind, *values, full = struct.unpack(">4sHHHB", data[colour.start : colour.stop])
        _check(kind == b"nclx" and set(values) <= _COLOURS)
        settings |= dict(zip(("color_primaries", "color_trc", "colorspace"), values, strict=True))
        settings["color_range"] = 1 + (full >> 7)
    return settings


def _boxes(data: bytes, part: _Part, known: Set[bytes] | None = None) -> _Boxes:
    """kind -> the boxes of it in `part`, which must be made of boxes alone, and of `known` ones where given."""
    found: _Boxes = defaultdict(list)
    at, stop = part
    while at < stop:
        size, kind = struct.unpack_from(">I4s", data, at)
        _check(8 <= size <= stop - at and (known is None or kind in known))
        found[kind].append(_Part(at + 8, at + size))
        at += size
    return found


def _one(boxes: _Boxes, kind: bytes) -> _Part:
    _check(len(boxes[kind]) == 1)
    return boxes[kind][0]


def _fields(form: str, data: bytes, part: _Part, skip: int = 0) -> tuple[Any, ...]:
    """Fields of a box of version 0, `skip` bytes after its version and flags."""
    _check(part.start + 4 + skip + struct.calcsize(form) <= part.stop and data[part.start] == 0)
    return struct.unpack_from(form, data, part.start + 4 + skip)


def _table(data: bytes, part: _Part, columns: int, kind: str = ">i4", skip: int = 0) -> Ints:
    """Return the rows of a counted table, int64 [rows, columns]; signed, so that what is too large fails the checks."""
    (count,) = struct.unpack_from(">I", data, part.start + 4 + skip)
    start = part.start + 8 + skip
    _check(count > 0 and start + count * columns * int(kind[-1]) == part.stop)
    return np.frombuffer(data, kind, count * columns, start).reshape(count, columns).astype(np.int64)


def _check(known: bool) -> None:
    if not known:
        raise _Unknown
