"""Every operation against Pillow, frame by frame: equal to the bit, the nearest-neighbour transforms but for ties."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from vswin_dist.data.transforms import pixel_ops as ops

GREY = (128, 128, 128)


def frames_of(clip: Tensor) -> list[Image.Image]:
    return [Image.fromarray(f) for f in clip.permute(1, 2, 3, 0).numpy()]


def clip_of(frames: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(f) for f in frames])).permute(3, 0, 1, 2)


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Five frames of 45 x 52: noise, a dim gradient, one value alone, two values, and bright noise."""
    rng = np.random.default_rng(0)
    gradient = np.broadcast_to(np.arange(52)[None, :, None] + 40 + np.array([0, 20, 60]), (45, 52, 3))
    frames = [
        rng.integers(0, 256, (45, 52, 3)),
        gradient,
        np.full((45, 52, 3), 77),
        np.where(rng.random((45, 52, 3)) < 0.01, 10, 200),
        rng.integers(120, 256, (45, 52, 3)),
    ]
    return torch.from_numpy(np.stack(frames).astype(np.uint8)).permute(3, 0, 1, 2).contiguous()


def affine(*matrix: float) -> Callable[[Image.Image], Image.Image]:
    return lambda f: f.transform(f.size, Image.Transform.AFFINE, matrix, fillcolor=GREY)


EXACT: list[tuple[str, Callable[[Tensor], Tensor], Callable[[Image.Image], Image.Image]]] = [
    ("autocontrast", ops.autocontrast, ImageOps.autocontrast),
    ("equalize", ops.equalize, ImageOps.equalize),
    ("invert", ops.invert, ImageOps.invert),
    ("smooth", ops.smooth, lambda f: f.filter(ImageFilter.SMOOTH)),
    ("blur", ops.blur, lambda f: f.filter(ImageFilter.BLUR)),
    *[(f"solarize {t}", lambda c, t=t: ops.solarize(c, t), lambda f, t=t: ImageOps.solarize(f, t)) for t in (0, 197, 256)],
    *[(f"posterize {b}", lambda c, b=b: ops.posterize(c, b), lambda f, b=b: ImageOps.posterize(f, b)) for b in (2, 7, 8)],
    *[
        (
            f"{enhance.__name__} {x}",
            lambda c, x=x, e=enhance: getattr(ops, e.__name__.lower())(c, x),
            lambda f, x=x, e=enhance: e(f).enhance(x),
        )
        for x in (0.1, 0.79, 1.0, 1.21, 1.9)
        for enhance in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
    ],
    ("translate", lambda c: ops.translate(c, -4, 7), affine(1, 0, -7, 0, 1, 4)),
    ("translate back", lambda c: ops.translate(c, 4, -7), affine(1, 0, 7, 0, 1, -4)),
]
NEAREST: list[tuple[str, Callable[[Tensor], Tensor], Callable[[Image.Image], Image.Image]]] = [
    *[(f"rotate {d}", lambda c, d=d: ops.rotate(c, d), lambda f, d=d: f.rotate(d, fillcolor=GREY)) for d in (-30, 7, 30)],
    *[(f"shear x {s}", lambda c, s=s: ops.shear_x(c, s), affine(1, s, 0, 0, 1, 0)) for s in (-0.29, 0.07)],
    *[(f"shear y {s}", lambda c, s=s: ops.shear_y(c, s), affine(1, 0, 0, s, 1, 0)) for s in (-0.07, 0.29)],
]


@pytest.mark.parametrize(("operation", "expected"), [x[1:] for x in EXACT], ids=[x[0] for x in EXACT])
def test_equal_to_pillow(
    clip: Tensor, operation: Callable[[Tensor], Tensor], expected: Callable[[Image.Image], Image.Image]
) -> None:
    before = clip.clone()
    found = operation(clip)
    assert found.dtype == torch.uint8 and torch.equal(clip, before)
    assert torch.equal(found, clip_of([expected(f) for f in frames_of(clip)]))


@pytest.mark.parametrize(("operation", "expected"), [x[1:] for x in NEAREST], ids=[x[0] for x in NEAREST])
def test_transforms_take_the_pixels_that_pillow_takes(
    clip: Tensor, operation: Callable[[Tensor], Tensor], expected: Callable[[Image.Image], Image.Image]
) -> None:
    """Pillow counts in 1/65536 pixels: a source on the edge between two pixels may fall to either."""
    where = torch.arange(45 * 52).view(1, 1, 45, 52)
    number = torch.cat([where % 256, where // 256, where * 0]).to(torch.uint8)  # each pixel's own number
    for each in (number, clip):
        found, wanted = operation(each), clip_of([expected(f) for f in frames_of(each)])
        assert (found != wanted).any(0).double().mean() <= 0.001


def test_a_cut_out_is_a_grey_square_inside_the_frame(clip: Tensor) -> None:
    found = ops.cutout(clip[..., :45], 0.2, 0.5, 0.0)  # 9 pixels, half of them beyond the left edge
    changed = (found != clip[..., :45]).any(0).any(0)
    assert changed.any(1).nonzero().flatten().tolist() == list(range(18, 27))
    assert changed.any(0).nonzero().flatten().tolist() == list(range(4))
    assert (found[:, :, 18:27, :4] == 128).all()


def test_histograms_on_a_gpu_are_those_of_the_cpu(clip: Tensor) -> None:
    planes = clip.flatten(2).flatten(0, 1)
    assert torch.equal(ops._scattered_histograms(planes), ops._histograms(planes))
