"""Which frames and which part of them make a clip: random in training, a fixed grid of views in testing.

The rules are those of the published code's pipelines (SampleFrames, RandomResizedCrop, Resize, CenterCrop, ThreeCrop):

- `dense`: `clip` frames `stride` apart from a random start. Test clips start in the middle of equal parts of the
  possible starts (mmaction2 1.x spreads them from the first start to the last instead). A clip longer than its video
  wraps around to the video's beginning, from frame 0.
- `uniform` (Something-Something V2): one frame of each of `clip` equal segments of `frames - 1`, whose edges are
  rounded and belong to both neighbours; random in training, the middle in testing. Published with one clip; several
  take the middles of equal parts of each segment.

Boxes are (top, left, height, width) in pixels of the decoded frame.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vswin_dist.config.schema import DataSettings
from vswin_dist.manifest import Manifest

Indices = NDArray[np.int64]
Box = tuple[float, float, float, float]


def resolve(settings: DataSettings, manifest: Manifest) -> tuple[DataSettings, str]:
    """Decide the settings' `sampling`; returns them and a warning ("" for none).

    The rule of the training set's manifest holds unless the settings name one; naming another is allowed, with the warning.
    """
    bound, asked = manifest.sampling, settings.sampling
    if asked in (None, bound):
        return replace(settings, sampling=bound), ""  # type: ignore[arg-type] # read_manifest lets no other rule pass
    return settings, (
        f"warning: data.sampling={asked}, and the manifest of {settings.train} says {bound}. On "
        "Something-Something V2 the wrong rule costs 1 to 2.5 points of top-1. data.sampling=null takes "
        "the manifest's."
    )


def dense_clip(frames: int, clip: int, stride: int, start: int) -> Indices:
    """Take `clip` frames `stride` apart from `start`, wrapping around past the end. int64 [clip]."""
    return (start + stride * np.arange(clip, dtype=np.int64)) % frames


def segments(frames: int, clip: int) -> tuple[Indices, Indices]:
    """Find the first and last frame of each of `clip` equal segments, int64 [clip] each; ends are halves rounded to even."""
    edges = np.round((frames - 1) / clip * np.arange(clip + 1)).astype(np.int64)
    return edges[:-1], edges[1:]


def train_indices(frames: int, clip: int, stride: int, sampling: str | None, rng: np.random.Generator) -> Indices:
    """Choose the frame indices of a random training clip of a video with `frames` frames."""
    assert sampling in ("dense", "uniform"), f"data.sampling={sampling!r} was not resolved"
    if sampling == "uniform":
        first, last = segments(frames, clip)
        return rng.integers(first, last + 1)
    start = int(rng.integers(max(frames - clip * stride + 1, 1)))
    return dense_clip(frames, clip, stride, start)


def test_indices(frames: int, clip: int, stride: int, sampling: str | None, clips: int) -> list[Indices]:
    """Give the frame indices of `clips` test clips."""
    assert sampling in ("dense", "uniform"), f"data.sampling={sampling!r} was not resolved"
    if sampling == "uniform":
        first, last = segments(frames, clip)
        return [first + (last - first) * (2 * i + 1) // (2 * clips) for i in range(clips)]
    room = max(frames - clip * stride + 1, 0) / clips
    return [dense_clip(frames, clip, stride, int(i * room + room / 2)) for i in range(clips)]


def train_box(height: int, width: int, scale: tuple[float, ...], ratio: tuple[float, ...], rng: np.random.Generator) -> Box:
    """Choose a random resized crop: area `scale` of the frame, width/height log-uniform in `ratio`; else the centre."""
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return float(rng.integers(height - h + 1)), float(rng.integers(width - w + 1)), float(h), float(w)
    side = min(height, width)
    return float((height - side) // 2), float((width - side) // 2), float(side), float(side)


def test_boxes(height: int, width: int, size: int, short_side: int, crops: int) -> list[Box]:
    """Place the test crops of a frame that is resized to `short_side` and cut to squares of `size` pixels.

    Args:
        crops: 1 is the centre; 3 (and any other number but 5) lie evenly along the long side, the outer ones at its
            ends but for the pixel that integer steps leave. 5 is the "10 x 5" of the 384-pixel models: those three,
            the whole frame squeezed to a square, and the centre once more. The published repository holds no
            configuration of it; this is what a public evaluation of its 384-pixel checkpoint does (84.7 / 96.6 on
            Kinetics-400 against the published 84.9 / 96.7).

    Returns:
        `crops` boxes in the frame's own pixels, so that one resize does both; their edges may lie between pixels.
    """
    short_side = max(short_side, size)
    scale = short_side / min(height, width)
    tall, wide = int(height * scale + 0.5), int(width * scale + 0.5)  # the resized frame
    y, x = height / tall, width / wide
    top, left = (tall - size) // 2, (wide - size) // 2
    centre = (top * y, left * x, size * y, size * x)
    if crops == 1:
        return [centre]
    if crops == 5:
        whole = (0.0, 0.0, float(height), float(width))
        return [*test_boxes(height, width, size, short_side, 3), whole, centre]
    if width >= height:
        step = (wide - size) // (crops - 1)
        return [(top * y, i * step * x, size * y, size * x) for i in range(crops)]
    step = (tall - size) // (crops - 1)
    return [(i * step * y, left * x, size * y, size * x) for i in range(crops)]
