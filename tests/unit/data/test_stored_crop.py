"""Crops that travel as they are stored: the pixels that FFmpeg's scaler makes of them, and what cannot travel so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.native import native_view
from tests.unit.data.test_decode import picture, write
from vswin_dist.data.transforms.resample import crops_to_rgb, weights
from vswin_dist.data.video.decode import View, decode_views, video_info
from vswin_dist.data.video.stored_crop import Crop, resized
from vswin_dist.video import VideoInfo

CPU = torch.device("cpu")


def noisy(width: int, height: int) -> np.ndarray:
    """A picture with hard edges everywhere, uint8 [H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("made", [picture, noisy])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("box", [(0, 0, 64, 96), (8, 12, 40, 50), (2, 4, 60, 24)], ids=["whole", "part", "narrow"])
@pytest.mark.parametrize("size", [112, 48])
def test_pixels_are_those_of_the_scaler(box: Any, size: int, matrix: str, made: Any) -> None:
    """Where both have the same samples: a crop of even place and length, which FFmpeg cuts without moving chroma."""
    data = write([made(96, 64)] * 3, (96, 64), "ffv1", "matroska", matrix=matrix)
    view, video = View(np.array([0, 2]), box), VideoInfo(3, 96, 64, "v")
    for flip in (False, True):
        crop, rgb = native_view(data, view, video, size=size, flip=flip)
        scaled = decode_views(data, [view], video, size=size, flip=flip)
        stored = 1.5 * box[2] * box[3] <= 3 * size * size
        assert (crop.height, crop.width) == (box[2:] if stored else (size, size))
        apart = (rgb.int() - scaled.int()).abs()
        if stored:
            most = 2 if made is picture else 3  # each of the scaler's steps rounds
            assert apart.max() <= most and apart.float().mean() < 0.3, (apart.max(), apart.float().mean())


@pytest.mark.parametrize("box", [(0, 0, 48, 64), (5, 9, 30, 41), (6, 1, 21, 40)])
def test_chroma_lies_where_it_was_stored(box: Any) -> None:
    """A ramp of colour across and down the picture goes on through crops that begin and end at odd pixels."""
    y, x = np.mgrid[:48, :64]
    source = np.stack([60 + 2 * x, 180 - 2 * x + y, 60 + 2 * y], 2).clip(0, 255).astype(np.uint8)
    data = write([source], (64, 48), "ffv1", "matroska")
    for size in (48, 60):
        _, rgb = native_view(data, View(np.array([0]), box), VideoInfo(1, 64, 48, "v"), size=size)
        top, left, height, width = box
        down, across = (first + (np.arange(size) + 0.5) * n / size - 0.5 for first, n in ((top, height), (left, width)))
        wanted = np.stack(np.broadcast_arrays(60 + 2 * across, 180 - 2 * across + down[:, None], 60 + 2 * down[:, None]), 0)
        inner = (slice(None), slice(4, -4), slice(4, -4))  # beyond the crop its outermost samples repeat
        assert np.abs(rgb[0, :, 0].numpy().astype(float) - wanted)[inner].max() <= 2


@pytest.mark.parametrize(("length", "size"), [(100, 37), (37, 100), (64, 64), (5, 2)])
def test_weights_are_those_of_an_antialiased_resize(length: int, size: int) -> None:
    signal = torch.from_numpy(np.random.default_rng(0).random((1, 1, 1, length))).float()
    wanted = F.interpolate(signal, (1, size), mode="bilinear", antialias=True)[0, 0, 0]
    made = weights(size, length, length, 0.5, 1, CPU) @ signal[0, 0, 0]
    edge = 1 + size // length + size * 2 // length
    torch.testing.assert_close(made[edge:-edge], wanted[edge:-edge], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights(size, length, length, 0.5, 1, CPU).sum(1), torch.ones(size))


@pytest.mark.parametrize("width", [96, 97])
def test_a_flip_mirrors(width: int) -> None:
    data = write([picture(width, 64, i) for i in range(4)], (width, 64), "ffv1", "matroska")
    view, video = View(np.array([1, 3]), (3, 5, 50, 71)), VideoInfo(4, width, 64, "v")
    (_, plain), (_, flipped) = (native_view(data, view, video, size=56, flip=flip) for flip in (False, True))
    assert (plain.flip(-1).int() - flipped.int()).abs().max() <= 1 and not torch.equal(plain, flipped)


@pytest.mark.parametrize(
    ("pixels", "size"), [("yuv420p", 30), ("yuv422p", 64), ("yuv444p", 64), ("yuv420p10le", 64), ("gray", 64)]
)
def test_what_cannot_be_cut_comes_as_with_yuv(pixels: str, size: int) -> None:
    """Other layouts; and what would be more bytes than its RGB."""
    data = write([picture(96, 64)] * 2, (96, 64), "ffv1", "matroska", pixels)
    view, video = View(np.array([0, 1]), (0.0, 0.0, 64.0, 96.0)), VideoInfo(2, 96, 64, "v")
    crop, rgb = native_view(data, view, video, size=size)
    assert crop == resized(size, False)
    planes = decode_views(data, [view], video, size=size, pixel_format="yuv")
    assert torch.equal(rgb, crops_to_rgb(planes.flatten(), [crop], 2, size))


def test_frames_of_several_sizes_or_colours_come_as_with_yuv() -> None:
    for other in ({"size": (192, 128)}, {"matrix": "bt709"}):
        parts = [
            write([picture(*kind["size"])] * 10, container="mpegts", codec="mpeg2video", qmin="1", qmax="1", **kind)
            for kind in ({"size": (96, 64)}, {"size": (96, 64)} | other)
        ]
        data = b"".join(parts)
        video = video_info(data, "v")
        assert video.frames >= 19 and (video.width, video.height) == (96, 64)
        for indices, alike in (([2, 5], True), ([5, 15], False)):
            crop, rgb = native_view(data, View(np.array(indices), (0, 0, 64, 96)), video, size=64)
            assert (crop == resized(64, False)) != alike
            wanted = F.interpolate(
                torch.from_numpy(picture(96, 64)).permute(2, 0, 1)[None].float(), (64, 64), mode="bilinear", antialias=True
            )
            assert alike or other.get("size") or (rgb[0].float() - wanted.transpose(0, 1)).abs().mean() < 3


def test_clips_of_several_sizes_make_a_batch() -> None:
    """What a clip becomes does not depend on those beside it."""
    rng = np.random.default_rng(0)
    crops = [Crop(20, 31, 10, 16, 1.0, 0.5), Crop(33, 16, 17, 9, 0.0, -0.5, "bt709", True, True), resized(24, False)]
    clips = [torch.from_numpy(rng.integers(0, 256, 3 * crop.bytes, dtype=np.uint8)) for crop in crops]
    together = crops_to_rgb(torch.cat(clips), crops, 3, 24)
    assert together.shape == (3, 3, 3, 24, 24) and together.dtype == torch.uint8
    for one, clip, crop in zip(together, clips, crops, strict=True):
        assert torch.equal(one, crops_to_rgb(clip, [crop], 3, 24)[0])
