"""Which frames and which part of them make a clip: random in training, a fixed grid of views in testing.

Rules of the published recipes (FACTS: dense, 32 frames of stride 2; uniform, one frame of each equal segment;
4 clips x 3 crops). A clip longer than its video goes round to the video's beginning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def dense_clip(frames: int, clip: int, stride: int, start: int) -> Indices:
    """`clip` frames `stride` apart from `start`, going round past the end. int64 [clip]."""
    return (start + stride * np.arange(clip, dtype=np.int64)) % frames


def uniform_clip(frames: int, clip: int, offsets: NDArray[np.float64]) -> Indices:
    """One frame of each of `clip` equal segments, at `offsets` [clip] in [0, 1) of the segment. int64 [clip]."""
    edges = np.arange(clip) * (frames / clip)
    return np.minimum((edges + offsets * frames / clip).astype(np.int64), frames - 1)


def train_indices(frames: int, clip: int, stride: int, sampling: str, rng: np.random.Generator) -> Indices:
    """Frame indices of a random training clip of a video with `frames` frames."""
    if sampling == "uniform":
        return uniform_clip(frames, clip, rng.random(clip))
    start = int(rng.integers(max(frames - clip * stride + 1, 1)))
    return dense_clip(frames, clip, stride, start)


def test_indices(frames: int, clip: int, stride: int, sampling: str, clips: int) -> list[Indices]:
    """Frame indices of `clips` test clips, spread evenly over the video (uniform: over each segment)."""
    if sampling == "uniform":
        return [uniform_clip(frames, clip, np.full(clip, (i + 0.5) / clips)) for i in range(clips)]
    room = frames - clip * stride + 1
    starts = [int((i + 0.5) * room / clips) if room > 0 else 0 for i in range(clips)]
    return [dense_clip(frames, clip, stride, s) for s in starts]


def train_box(height: int, width: int, scale: tuple[float, ...], ratio: tuple[float, ...],
              rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random resized crop: area `scale` of the frame, width/height log-uniform in `ratio`; the centre after 10 misses."""
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return float(rng.integers(height - h + 1)), float(rng.integers(width - w + 1)), float(h), float(w)
    side = min(height, width)
    return (height - side) / 2, (width - side) / 2, float(side), float(side)


def test_boxes(height: int, width: int, size: int, short_side: int, crops: int) -> list[tuple[float, float, float, float]]:
    """Square crops of ``size / short_side`` of the short side, `crops` of them evenly along the long side."""
    side = min(height, width) * min(size / short_side, 1.0)
    top, left = (height - side) / 2, (width - side) / 2
    if crops == 1:
        return [(top, left, side, side)]
    if width >= height:
        return [(top, (width - side) * i / (crops - 1), side, side) for i in range(crops)]
    return [((height - side) * i / (crops - 1), left, side, side) for i in range(crops)]
