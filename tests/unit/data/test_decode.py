"""Views by frame number from any key frame, bit for bit as a full decode gives them; colours, boxes and turns."""

from __future__ import annotations

import io
import itertools
from typing import Any

import av
import av.filter
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.heap import growth, needs_heap
from tests.support.native import native_view
from vswin_dist.data.transforms.normalise import to_rgb
from vswin_dist.data.video import decode
from vswin_dist.data.video.decode import View, clip_shape, decode_views, video_info, wanted_frames
from vswin_dist.errors import ConfigError, DataError
from vswin_dist.video import VideoInfo

FORMS = ("rgb", "yuv")
ALL_FORMS = (*FORMS, "native")


def write(
    pictures: Any,
    size: tuple[int, int],
    codec: str = "libx264",
    container: str = "mp4",
    pixels: str = "yuv420p",
    matrix: str = "bt601",
    full: bool = False,
    **options: str,
) -> bytes:
    """A video of `pictures`, each uint8 [H, W, 3]; `matrix` and `full` say how colours are stored, chroma at the left."""
    out = io.BytesIO()
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add("buffer", video_size=f"{size[0]}x{size[1]}", pix_fmt="rgb24", time_base="1/25", pixel_aspect="1/1"),
        graph.add(
            "scale",
            f"flags=bilinear+accurate_rnd:out_chroma_loc=left:out_color_matrix={matrix}:out_range={'pc' if full else 'tv'}",
        ),
        graph.add("format", pixels),
        graph.add("buffersink"),
    ).configure()
    with av.open(out, "w", format=container) as c:
        stream: Any = c.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = {"bt601": 6, "bt709": 1}[matrix], 1 + full
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            graph.push(frame)
            c.mux(stream.encode(graph.pull()))
        c.mux(stream.encode())
    return out.getvalue()


def video(frames: int, bframes: int = 2, container: str = "mp4") -> bytes:
    """A clip whose frame number is its brightness: frame i is gray 8 * i."""
    return write(
        (np.full((32, 32, 3), 8 * i, np.uint8) for i in range(frames)),
        (32, 32),
        container=container,
        g="12",
        bf=str(bframes),
        crf="10",
    )


def picture(width: int, height: int, shift: int = 0) -> np.ndarray:
    """Smooth colours that differ everywhere, uint8 [H, W, 3]; `shift` moves them."""
    y, x = np.mgrid[:height, :width] + shift
    waves = (np.sin(x / 18) + np.sin(y / 26), np.cos(x / 30) + np.sin(y / 16), np.sin((x + y) / 22) + np.cos(x / 42))
    return np.stack([(127 + 50 * w).astype(np.uint8) for w in waves], 2)


def views_of(
    data: bytes,
    indices: Any,
    form: str = "rgb",
    box: Any = None,
    shown: tuple[int, int] = (32, 32),
    size: int = 32,
    flip: bool = False,
    frames: int = 30,
    name: str = "v",
) -> torch.Tensor:
    """One view in RGB whatever the form, uint8 [3, T, S, S]; `shown` is (width, height)."""
    view, video = View(np.array(indices), box or (0, 0, shown[1], shown[0])), VideoInfo(frames, *shown, name)
    if form == "native":
        return native_view(data, view, video, size=size, flip=flip)[1][0]
    made = decode_views(data, [view], video, size=size, flip=flip, pixel_format=form)
    assert made.shape == (1, *clip_shape(len(indices), size, form)) and made.dtype == torch.uint8
    return to_rgb(made)[0]


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("indices", [[0], [29], [13, 14, 15], [25, 3, 3, 17], list(range(30))])
def test_frames_come_by_their_number(indices: list[int], container: str) -> None:
    data = video(30, bframes=0 if container == "avi" else 2, container=container)
    for form in ALL_FORMS:
        clip = views_of(data, indices, form).float()
        assert (clip.mean((0, 2, 3)) - 8 * torch.tensor(indices)).abs().max() < 3


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "20", "bf": "3", "b-pyramid": "normal", "x264-params": "b-adapt=0"}),
        ("libx264", {"g": "20", "bf": "3", "x264-params": "open-gop=1:b-adapt=0"}),
        ("mpeg4", {"g": "10", "bf": "2"}),
        ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_what_is_left_out_changes_no_bit(codec: str, options: dict[str, str]) -> None:
    data = write((picture(64, 48, 2 * i) for i in range(60)), (64, 48), codec, "matroska", **options)
    whole = [frame.to_ndarray() for frame in av.open(io.BytesIO(data)).decode(video=0)]
    rng = np.random.default_rng(0)
    clips = [rng.integers(60, size=4) for _ in range(6)] + [(start + 2 * np.arange(12)) % 60 for start in (0, 19, 31, 50)]
    for clip in clips:
        found = dict(wanted_frames(data, set(clip.tolist()), 60))
        assert set(found) == set(clip.tolist())
        assert all(np.array_equal(frame.to_ndarray(), whole[i]) for i, frame in found.items())


class Counting:
    """A decoder that counts the frames it gives out."""

    def __init__(self, decoder: Any, given: list[int]) -> None:
        self.__dict__.update(decoder=decoder, given=given)

    def decode(self, packet: Any) -> Any:
        frames = self.decoder.decode(packet)
        self.given.extend(frame.pts for frame in frames)
        return frames

    def flush_buffers(self) -> None:
        self.decoder.flush_buffers()

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.decoder, name, value)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_frames_that_no_other_needs_are_not_decoded(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(
        (picture(64, 48, 2 * i) for i in range(60)),
        (64, 48),
        "libx264",
        container,
        g="20",
        bf="3",
        **{"b-pyramid": "none", "x264-params": "b-adapt=0:scenecut=0"},
    )
    given: list[int] = []
    plain = decode._decode
    monkeypatch.setattr(decode, "_decode", lambda decoder, *args: plain(Counting(decoder, given), *args))
    assert len(dict(wanted_frames(data, {21, 56}, 60))) == 2
    assert len(given) == 3 + 5  # of each fourth frame, what lies between is skipped: 20, 24 and 21; 40, 44 ... 56


def test_spans_begin_at_key_frames_and_join() -> None:
    times = [0, 4, 2, 1, 3, 8, 6, 5, 7, 12, 10, 9, 11]  # in decoding order; key frames are those at 0, 8, 12
    keys = [0, 5, 9]
    assert decode.spans(times, keys, [2]) == [(0, 3)]
    assert decode.spans(times, keys, [7]) == [(0, 9)]  # an open group: decoded after key frame 8, shown before it
    assert decode.spans(times, keys, [1, 11]) == [(0, 4), (5, 13)]
    assert decode.spans(times, keys, [12, 9, 3]) == [(0, 12)]  # adjoining parts are one


COLOURS = {  # pixels, matrix, full range, width, height
    "601": ("yuv420p", "bt601", False, 160, 120),
    "709": ("yuv420p", "bt709", False, 160, 120),
    "full": ("yuvj420p", "bt601", True, 160, 120),
    "709 full": ("yuv420p", "bt709", True, 160, 120),
    "10 bits": ("yuv420p10le", "bt601", False, 160, 120),
    "4:4:4": ("yuv444p", "bt601", False, 160, 120),
    "4:2:2": ("yuv422p", "bt601", False, 160, 120),
    "odd": ("yuv420p", "bt601", False, 161, 121),
    "rgb": ("bgr0", "bt601", True, 160, 120),
}


@pytest.mark.parametrize("box", [(0, 0, 120, 160), (20, 30, 64, 64), (21, 31, 75, 91)], ids=["whole", "even", "odd"])
@pytest.mark.parametrize("colours", COLOURS)
def test_colours_come_out_as_those_of_the_plain_path(colours: str, box: tuple[int, ...]) -> None:
    """Against the picture that was encoded (without loss but that of YUV), cut and resized in float."""
    pixels, matrix, full, width, height = COLOURS[colours]
    source = picture(width, height)
    codec, options = ("libx264", {"qp": "0"}) if pixels == "yuvj420p" else ("ffv1", {})
    data = write([source] * 2, (width, height), codec, "matroska", pixels, matrix, full, **options)
    top, left, high, wide = box
    cut = torch.from_numpy(source[top : top + high, left : left + wide]).permute(2, 0, 1)[None].double()
    plain = F.interpolate(cut, size=(64, 64), mode="bilinear", antialias=True)[0]
    made = {form: views_of(data, [1], form, box, (width, height), 64, frames=2)[:, 0].double() for form in ALL_FORMS}
    for form in ALL_FORMS:
        error = (made[form] - plain).abs()
        assert error.mean() < 1.3 and error.max() <= 10, (form, error.mean(), error.max())
    apart = (made["rgb"] - made["yuv"]).abs()
    assert apart.mean() < 0.9 and apart.max() <= 8, (apart.mean(), apart.max())


def turned(data: bytes, matrix: tuple[int, ...]) -> bytes:
    """An mp4 whose header says that it is to be shown turned."""
    at = data.index(b"tkhd") + 44
    fixed = (*(v << 16 for v in matrix), 0, 0, 0, 1 << 30)
    matrix_bytes = b"".join(int(v).to_bytes(4, "big", signed=True) for v in (*fixed[:2], 0, *fixed[2:4], 0, 0, 0, 1 << 30))
    return data[:at] + matrix_bytes + data[at + 36 :]


# a, b, c, d of ISO/IEC 14496-12, 6.2.2: the pixel of (x, y) is shown at (a x + c y, b x + d y)
SIGNS = tuple(itertools.product((1, -1), repeat=2))
MATRICES = [(s, 0, 0, t) for s, t in SIGNS] + [(0, s, t, 0) for s, t in SIGNS]


def shown_by(matrix: tuple[int, ...], stored: np.ndarray) -> np.ndarray:
    """The picture [H, W, 3] as displayed, pixel by pixel."""
    a, b, c, d = matrix
    y, x = np.mgrid[: stored.shape[0], : stored.shape[1]]
    across, down = a * x + c * y, b * x + d * y
    shown = np.zeros((np.ptp(down) + 1, np.ptp(across) + 1, 3), stored.dtype)
    shown[down - down.min(), across - across.min()] = stored
    return shown


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("form", ALL_FORMS)
def test_boxes_are_cut_as_displayed(matrix: tuple[int, ...], form: str) -> None:
    plain = write([picture(96, 64)] * 3, (96, 64), crf="1")
    data = turned(plain, matrix)
    shown = shown_by(matrix, next(av.open(io.BytesIO(plain)).decode(video=0)).to_ndarray(format="rgb24"))
    height, width = shown.shape[:2]
    size = 64 if form == "native" else 32  # no crop is then resized before it is sent
    for box in ((0, 0, height, width), (10, 6, 50, 44)):
        part = views_of(data, [0], form, box, (width, height), size, frames=3)[:, 0].float()
        cut = torch.from_numpy(shown[box[0] : box[0] + box[2], box[1] : box[1] + box[3]].copy()).permute(2, 0, 1)
        resized = F.interpolate(cut[None].float(), (size, size), mode="bilinear", antialias=True)
        assert (part - resized[0]).abs().mean() < 2.5
    assert video_info(data, "v") == VideoInfo(3, width, height, "v")


@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("form", FORMS)
def test_a_flip_mirrors_and_views_do_not_disturb_each_other(form: str, size: int) -> None:
    data = write((picture(96, 64, i) for i in range(12)), (96, 64), g="6")
    info, args = VideoInfo(12, 96, 64, "v"), {"size": size, "pixel_format": form}
    boxes = ((0, 0, 64, 64), (3, 20, 41, 50))
    views = [View(np.array(i), box) for i, box in itertools.product(([1, 3, 5], [5, 7, 1]), boxes)]
    together = decode_views(data, views, info, **args)
    for v, view in enumerate(views):
        alone = torch.empty_like(together[v])
        decode_views(data, [view], info, **args, out=alone[None])
        assert torch.equal(together[v], alone)
    flipped = to_rgb(decode_views(data, views, info, flip=True, **args))
    assert torch.equal(flipped, to_rgb(together).flip(-1))


@needs_heap
def test_reading_a_part_of_a_video_leaks_nothing() -> None:
    data = video(30)

    def read() -> None:
        assert len(list(wanted_frames(data, [1, 5], 30))) == 2

    assert growth(read) < 50, "an AVPacket alone has 104 bytes"


def test_corrupt_files_are_named() -> None:
    with pytest.raises(DataError, match="clip7"):
        views_of(b"no video at all", [0], frames=1, name="clip7")
    with pytest.raises(DataError, match="clip8"):
        video_info(video(10)[:300], "clip8")
    with pytest.raises(DataError, match=r"frames 0\.\.12 asked for, it has 10"):
        views_of(video(10), [0, 12], frames=10)
    with pytest.raises(ConfigError, match=r"even data\.size, not 31"):
        views_of(video(10), [0], "yuv", size=31, frames=10)


def test_a_manifest_that_promises_too_many_frames_is_an_error() -> None:
    with pytest.raises(DataError, match="frame 11 of 12 does not decode"):
        views_of(video(10), [1, 11], frames=12)


def test_frames_are_counted() -> None:
    assert video_info(video(17), "v") == VideoInfo(17, 32, 32, "v")
