"""What a reader that obeys the tags sees in a shard, and the model in either form, are the colours that were drawn.

Planes are computed here, by the standards' formula, and read again by it: nothing of FFmpeg's conversions is believed.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from data_prep.encode import process
from data_prep.settings import Encoding, PrepSettings
from data_prep.sources.folder import FolderSource
from tests.support.native import native_view
from tests.unit.data.test_decode import turned
from tests.unit.data_prep.inprocess import prepare
from vswin_dist.config import load_settings
from vswin_dist.data.loader import TrainLoader
from vswin_dist.data.loader import test_batches as view_batches
from vswin_dist.data.plan import make_plan
from vswin_dist.data.transforms.normalise import to_rgb
from vswin_dist.data.video.decode import View, decode_views, video_info
from vswin_dist.device import Rank
from vswin_dist.manifest import read_manifest
from vswin_dist.video import VideoInfo

# name -> share of red and of blue in luma (ITU-R BT.709, BT.601, BT.2020, SMPTE 240M, FCC 73.682), and AVColorSpace
MATRICES = {
    "bt709": (0.2126, 0.0722, 1),
    "fcc": (0.30, 0.11, 4),
    "bt470bg": (0.299, 0.114, 5),
    "smpte170m": (0.299, 0.114, 6),
    "smpte240m": (0.212, 0.087, 7),
    "bt2020nc": (0.2627, 0.0593, 9),
    "untagged": (0.299, 0.114, 2),  # as FFmpeg takes it, at any size
}
SHARES = {number: (red, blue) for red, blue, number in MATRICES.values()}
KINDS = {  # pixels -> bits, chroma's part of width and height, codec
    "yuv420p": (8, 2, 2, "ffv1"),
    "yuv422p": (8, 2, 1, "ffv1"),
    "yuv444p": (8, 1, 1, "ffv1"),
    "yuv420p10le": (10, 2, 2, "ffv1"),
    "yuv422p10le": (10, 2, 1, "ffv1"),
    "yuv420p12le": (12, 2, 2, "ffv1"),
}
DRAWN = np.array(
    [(200, 40, 40), (40, 200, 40), (40, 40, 200), (220, 210, 30), (30, 190, 210), (200, 60, 190), (0, 0, 0), (255, 255, 255)]
)
GREYS = np.array([(level,) * 3 for level in (58, 200, 16, 235, 0, 255, 100, 150)])
# The encoder's own loss is not what is tested here.
PROFILES = {
    "train": Encoding(short_side=60, crf=4),
    "archive": Encoding(profile="archive", crf=4),
    "copy": Encoding(profile="copy"),
}
SIZE = (160, 120)


def chart(colours: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Eight patches, four in a row, as a picture [H, W, 3]."""
    y, x = np.mgrid[: size[1], : size[0]]
    return colours[y * 2 // size[1] * 4 + x * 4 // size[0]]


def patches(picture: np.ndarray) -> np.ndarray:
    """The colours of the patches' centres."""
    height, width = picture.shape[:2]
    return np.array([picture[height * (1 + 2 * row) // 4, width * (1 + 2 * c) // 8] for row in range(2) for c in range(4)])


def to_planes(picture: np.ndarray, matrix: str, full: bool, bits: int) -> list[np.ndarray]:
    """Y, Cb and Cr of every pixel (ITU-R BT.601, 2.5.1 to 2.5.4; BT.2100, table 9)."""
    red, blue, _ = MATRICES[matrix]
    r, g, b = np.moveaxis(picture / 255, 2, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    planes = (y, (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red))
    top, unit = 2**bits - 1, 2 ** (bits - 8)
    levels = (
        [(top, 0)] + [(top, 2 ** (bits - 1))] * 2 if full else [(219 * unit, 16 * unit)] + [(224 * unit, 128 * unit)] * 2
    )
    stored = [np.rint(plane * scale + zero).clip(0, top) for plane, (scale, zero) in zip(planes, levels, strict=True)]
    return [plane.astype("<u2" if bits > 8 else "u1") for plane in stored]


def fill(frame: av.VideoFrame, planes: list[np.ndarray]) -> None:
    for plane, values in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size), np.uint8)
        content = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
        rows[:, : content.shape[1]] = content
        plane.update(rows.tobytes())


def write(
    planes: list[np.ndarray],
    pixels: str,
    tags: tuple[int, int],
    codec: str = "ffv1",
    container: str = "matroska",
    **options: str,
) -> bytes:
    """Two frames of `planes` under the `tags`, AVColorSpace and AVColorRange."""
    height, width = planes[0].shape[0], planes[0].shape[1]
    out = io.BytesIO()
    with av.open(out, "w", format=container) as c:
        stream: Any = c.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = tags
        for number in range(2):
            frame: Any = av.VideoFrame(width, height, pixels)
            fill(frame, planes)
            frame.pts, frame.colorspace, frame.color_range = number, *tags
            c.mux(stream.encode(frame))
        c.mux(stream.encode())
    return out.getvalue()


def drawn(
    matrix: str,
    full: bool,
    pixels: str,
    size: tuple[int, int] = SIZE,
    codec: str = "",
    colours: np.ndarray = DRAWN,
    **more: str,
) -> bytes:
    """A video of the chart."""
    bits, across, down, usual = KINDS[pixels]
    y, *chroma = to_planes(chart(colours, size), matrix, full, bits)
    tags = MATRICES[matrix][2], 1 + full
    return write([y, *(plane[::down, ::across] for plane in chroma)], pixels, tags, codec or usual, **more)


def as_tagged(frame: Any) -> np.ndarray:
    """The picture as the frame's tags say, by the formula of `to_planes` the other way, chroma repeated."""
    assert frame.format.name in ("yuv420p", "yuvj420p"), frame.format.name
    assert frame.colorspace in SHARES, f"a matrix of number {frame.colorspace}"
    full = frame.color_range == 2 or frame.format.name == "yuvj420p"
    height, width = frame.height, frame.width
    y, u, v = (
        np.frombuffer(bytes(p), np.uint8).reshape(p.height, p.line_size)[:, : p.width].astype(float) for p in frame.planes
    )
    u, v = (plane.repeat(2, 0).repeat(2, 1)[:height, :width] - 128 for plane in (u, v))
    y, u, v = (y / 255, u / 255, v / 255) if full else ((y - 16) / 219, u / 224, v / 224)
    red, blue = SHARES[frame.colorspace]
    r, b = y + (2 - 2 * red) * v, y + (2 - 2 * blue) * u
    return np.rint(255 * np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], 2)).clip(0, 255)


def first(data: bytes) -> Any:
    with av.open(io.BytesIO(data)) as container:
        return next(container.decode(video=0))


def seen(data: bytes, form: str, video: VideoInfo | None = None) -> np.ndarray:
    """The picture that the model is given, resized to a square."""
    video = video or video_info(data, "v")
    view = View(np.array([1]), (0, 0, video.height, video.width))
    if form == "native":
        _, rgb = native_view(data, view, video, size=104)  # no smaller: the whole picture is sent as it is
    else:
        rgb = to_rgb(decode_views(data, [view], video, size=96, pixel_format=form))
    return rgb[0, :, 0].permute(1, 2, 0).numpy().astype(int)


def packed(data: bytes, profile: str) -> bytes:
    outcome, content = process(data, PROFILES[profile], "v.mkv")
    assert outcome.kept, outcome
    return content


def check(data: bytes, profile: str, wanted: np.ndarray) -> None:
    """All readers of the shard see `wanted`, the patches' colours."""
    content = packed(data, profile)
    if profile != "copy":
        error = np.abs(patches(as_tagged(first(content))) - wanted).max()
        assert error <= 2, f"off by {error} for a reader that obeys the tags"
    for form in ("rgb", "yuv", "native"):
        error = np.abs(patches(seen(content, form)) - wanted).max()
        assert error <= 2, f"off by {error} in {form}"


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("pixels", KINDS)
@pytest.mark.parametrize("full", [False, True], ids=["tv", "pc"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_are_those_that_were_drawn(matrix: str, full: bool, pixels: str, profile: str) -> None:
    check(drawn(matrix, full, pixels), profile, DRAWN)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("codec", "container", "full", "options"),
    [
        ("libx264", "mp4", False, {"qp": "0"}),
        ("libx264", "mp4", True, {"qp": "0"}),  # decodes as yuvj420p
        ("libvpx-vp9", "webm", False, {"lossless": "1"}),
        ("libvpx-vp9", "webm", True, {"lossless": "1"}),
        ("mjpeg", "avi", True, {"qmin": "1", "qmax": "1"}),
    ],
)
def test_colours_of_other_codecs(codec: str, container: str, full: bool, options: dict[str, str], profile: str) -> None:
    matrix = "bt470bg" if codec == "mjpeg" else "bt709"  # JPEG knows one
    check(drawn(matrix, full, "yuv420p", codec=codec, container=container, **options), profile, DRAWN)


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("size", [(161, 121), (120, 160), (64, 48), (1280, 720)], ids=str)
def test_colours_at_any_size(size: tuple[int, int], profile: str) -> None:
    for matrix in ("bt709", "untagged"):
        check(drawn(matrix, True, "yuv444p", size), profile, DRAWN)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("display", "clockwise"), [((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)])
def test_colours_of_turned_videos(display: tuple[int, ...], clockwise: int, profile: str) -> None:
    upright = np.rot90(DRAWN.reshape(2, 4, 3), -clockwise)
    for full in (False, True):
        plain = drawn("bt709", full, "yuv420p", codec="libx264", container="mp4", qp="0")
        content = packed(turned(plain, display), profile)
        for form in ("rgb", "yuv"):
            rows, columns = upright.shape[:2]
            picture = seen(content, form)
            centres = picture[96 // rows // 2 :: 96 // rows, 96 // columns // 2 :: 96 // columns]
            assert np.abs(centres - upright).max() <= 2


def test_planes_of_8_bits_and_limited_range_stay() -> None:
    red = [np.full((240, 320), 80, np.uint8), np.full((120, 160), 112, np.uint8), np.full((120, 160), 198, np.uint8)]
    for number in (1, 4, 5, 6, 7, 9, 2):
        for encoding in (Encoding(), Encoding(short_side=64), Encoding(profile="archive")):
            frame = first(process(write(red, "yuv420p", (number, 1)), encoding, "v.mkv")[1])
            assert [set(bytes(p)[: p.width]) for p in frame.planes] == [{80}, {112}, {198}]
            assert frame.colorspace == number


RGB = {  # pixels -> codec, container
    "rgb24": ("qtrle", "mov"),
    "bgr24": ("rawvideo", "avi"),
    "bgr0": ("ffv1", "matroska"),
    "argb": ("qtrle", "mov"),
    "rgba": ("png", "mov"),
    "gbrp": ("libx265", "matroska"),
    "gbrp10le": ("ffv1", "matroska"),
    "gbrp16le": ("ffv1", "matroska"),
    "rgb48be": ("png", "mov"),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("pixels", RGB)
def test_rgb_becomes_bt601_and_says_so(pixels: str, profile: str) -> None:
    codec, container = RGB[pixels]
    out = io.BytesIO()
    with av.open(out, "w", format=container) as c:
        lossless = {"x265-params": "lossless=1:bframes=0:log-level=none"} if codec == "libx265" else {}
        stream: Any = c.add_stream(codec, rate=25, options=lossless)
        stream.width, stream.height, stream.pix_fmt = *SIZE, pixels
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(chart(DRAWN).astype(np.uint8), format="rgb24").reformat(format=pixels)
            frame.pts = number
            c.mux(stream.encode(frame))
        c.mux(stream.encode())
    assert first(out.getvalue()).format.is_rgb
    check(out.getvalue(), profile, DRAWN)
    if profile != "copy":
        frame = first(packed(out.getvalue(), profile))
        assert (frame.format.name, frame.colorspace, frame.color_range) == ("yuv420p", 6, 1)


GREY = {"gray": 8, "gray10le": 10, "gray12le": 12, "gray16le": 16, "ya8": 8}  # pixels -> bits


def grey(pixels: str, tags: tuple[int, int], codec: str = "ffv1", container: str = "matroska", **options: str) -> bytes:
    """A video of the chart in grey levels, of full range, which all grey has in FFmpeg."""
    bits = GREY[pixels]
    levels = np.rint(chart(GREYS)[..., 0] / 255 * (2**bits - 1)).astype("<u2" if bits > 8 else "u1")
    if pixels == "ya8":
        levels = np.stack([levels, np.full_like(levels, 255)], 2)
    return write([levels], pixels, tags, codec, container, **options)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("pixels", GREY)
@pytest.mark.parametrize("tags", [(2, 2), (1, 2), (2, 0)], ids=str)
def test_grey_is_not_washed_out(pixels: str, tags: tuple[int, int], profile: str) -> None:
    check(grey(pixels, tags), profile, GREYS)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {"qp": "0"}),  # which decodes as yuvj420p
        ("libx265", "matroska", {"x265-params": "lossless=1:bframes=0:log-level=none"}),
        ("png", "mov", {}),  # tagged as RGB
    ],
)
def test_grey_of_other_codecs(codec: str, container: str, options: dict[str, str], profile: str) -> None:
    check(grey("gray", (2, 2), codec, container, **options), profile, GREYS)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_palette_of_full_range_is_not_washed_out(profile: str) -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mov") as c:
        stream: Any = c.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "pal8"
        table = np.zeros((256, 4), np.uint8)
        table[:8] = np.insert(DRAWN, 0, 255, axis=1)
        for number in range(2):
            frame = av.VideoFrame.from_ndarray((chart(np.arange(8)).astype(np.uint8), table), format="pal8")
            frame.pts = number
            c.mux(stream.encode(frame))
        c.mux(stream.encode())
    frame = first(out.getvalue())
    assert (frame.format.name, frame.color_range) == ("pal8", 2)
    check(out.getvalue(), profile, DRAWN)


def test_shards_of_before_are_read_as_they_were() -> None:
    """58 and 200 as 66 and 187: what the version before read as planes."""
    data = grey("gray", (2, 2))
    video = VideoInfo(2, *SIZE, "v", earlier_colours=True)
    assert patches(seen(data, "yuv", video))[:2, 0].tolist() == [66, 187]
    assert np.array_equal(seen(data, "rgb", video), seen(data, "rgb"))
    for full, number in ((False, 1), (True, 9), (False, 2)):
        matrix = next(name for name, (*_, n) in MATRICES.items() if n == number)
        data = drawn(matrix, full, "yuv420p")
        for form in ("rgb", "yuv"):
            assert np.array_equal(seen(data, form, video), seen(data, form))


@pytest.mark.slow
@pytest.mark.parametrize(("colours", "levels"), [(2, [58, 200]), (1, [66, 187])])
def test_the_manifest_says_how_its_videos_are_read(colours: int, levels: list[int], tmp_path: Path) -> None:
    for name in "ab":
        path = tmp_path / "videos" / name / f"{name}.mkv"
        path.parent.mkdir(parents=True)
        path.write_bytes(grey("gray", (2, 2)) + name.encode())
    prepare(FolderSource(str(tmp_path / "videos")), tmp_path / "out", PrepSettings(PROFILES["copy"]))
    made = read_manifest(str(tmp_path / "out"))
    assert made.colours == 2
    manifest, url = replace(made, colours=colours), str(tmp_path / "out")
    whole = ("data.pixel_format=yuv", "data.size=96", "data.short_side=96", "data.frames=2", "data.flip=0")
    still = ("data.crop_scale=[1,1]", "data.crop_ratio=[1,1]", "data.workers=0")
    s = load_settings("demo", [f"data.train={url}", f"data.val={url}", *whole, *still]).data
    tested = next(view_batches(manifest, url, s, [[0]], 1, 1))["views"]
    trained = next(iter(TrainLoader(manifest, s, make_plan(manifest, s, 0, 2), Rank(0, 1, torch.device("cpu")), 2, 1)))[
        "clips"
    ]
    for clip in (tested[0], trained[:1]):
        # the square in the middle of a picture that is 160 wide shows half of the first patch and of the last
        shown = to_rgb(clip)[0, 0, 0]
        assert np.abs(np.array([shown[24, 4], shown[24, 24]]) - levels).max() <= 1


def test_a_change_of_tags_within_the_video_keeps_the_colours() -> None:
    parts = [
        drawn(matrix, False, "yuv420p", codec="mpeg2video", container="mpegts", qmin="1", qmax="1")
        for matrix in ("bt709", "smpte170m", "smpte240m")
    ]
    with av.open(io.BytesIO(b"".join(parts))) as container:
        assert [f.colorspace for f in container.decode(video=0)] == [1, 1, 6, 6, 7, 7]
    for profile in ("train", "archive"):
        with av.open(io.BytesIO(packed(b"".join(parts), profile))) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == 6
        for frame in frames:
            assert np.abs(patches(as_tagged(frame)) - DRAWN).max() <= 2


def test_a_matrix_that_planes_cannot_have_is_left_out() -> None:
    for number in (0, 3):
        y, u, v = to_planes(chart(DRAWN), "untagged", False, 8)
        data = packed(write([y, u[::2, ::2], v[::2, ::2]], "yuv420p", (number, 1)), "train")
        assert first(data).colorspace == 2
        assert np.abs(patches(as_tagged(first(data))) - DRAWN).max() <= 2
