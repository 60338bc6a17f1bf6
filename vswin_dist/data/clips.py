"""From a video's bytes to the clip or the views that the model takes."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vswin_dist.config.schema import DataSettings
from vswin_dist.data import sampling
from vswin_dist.data.decode import View, decode_views
from vswin_dist.manifest import Sample


def train_clip(data: bytes, sample: Sample, s: DataSettings, flipped: int | None, rng: np.random.Generator,
               out: Tensor) -> int:
    """A random clip of a video, cropped and flipped as `rng` says.

    Args:
        flipped: the class of the flipped clip; None where it must not be flipped (see `mirror.flipped_classes`).
        out: where the clip goes, uint8 [3, T, size, size] or planes [T, size * size * 3 / 2].

    Returns:
        Its class id.

    Raises:
        DataError: the video does not decode.
    """
    indices = sampling.train_indices(sample.frames, s.frames, s.stride, s.sampling, rng)
    flip = bool(rng.random() < s.flip) and flipped is not None
    box = sampling.train_box(sample.height, sample.width, s.crop_scale, s.crop_ratio, rng)
    decode_views(data, [View(indices, box)], frames=sample.frames, width=sample.width, height=sample.height, size=s.size,
                 flip=flip, pixel_format=s.pixel_format, name=sample.key, out=out[None])
    return flipped if flip and flipped is not None else sample.class_id


def video_views(data: bytes, frames: int, width: int, height: int, name: str, s: DataSettings, clips: int,
                crops: int, out: Tensor | None = None) -> Tensor:
    """The test views of one video, uint8 [clips * crops, 3, T, size, size] or planes as in `train_clip`; clip by clip.

    Several crops are cut at full short side (`size` pixels of it, as published); a single one is the centre
    ``size / short_side`` of the frame. They are written into `out` where it is given.

    Raises:
        DataError: the video does not decode.
    """
    times = sampling.test_indices(frames, s.frames, s.stride, s.sampling, clips)
    boxes = sampling.test_boxes(height, width, s.size, s.size if crops > 1 else s.short_side, crops)
    return decode_views(data, [View(t, box) for t in times for box in boxes], frames=frames, width=width, height=height,
                        size=s.size, pixel_format=s.pixel_format, name=name, out=out)
