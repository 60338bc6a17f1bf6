"""From a video's bytes to the clip or the views that the model takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vswin_dist.config.schema import DataSettings
from vswin_dist.data import sampling
from vswin_dist.data.video.decode import View, decode_crop, decode_views
from vswin_dist.data.video.stored_crop import Crop
from vswin_dist.manifest import COLOURS, Sample
from vswin_dist.video import VideoInfo


@dataclass(frozen=True)
class _Key:
    """A sample's key, read where an error names it."""

    sample: Sample

    def __str__(self) -> str:
        return self.sample.key


def info_of(sample: Sample, colours: int = COLOURS) -> VideoInfo:
    """Take from `sample` what its decoding must know, named by its key; `colours` are its manifest's."""
    return VideoInfo(sample.frames, sample.width, sample.height, _Key(sample), earlier_colours=colours < COLOURS)


def train_clip(
    data: bytes,
    sample: Sample,
    s: DataSettings,
    flipped: int | None,
    rng: np.random.Generator,
    out: Tensor,
    colours: int = COLOURS,
) -> tuple[int, Crop | None]:
    """Cut a random clip out of a video, cropped and flipped as `rng` says.

    Args:
        flipped: the class of the flipped clip; None where it must not be flipped (see `flip_labels.flipped_classes`).
        out: where the clip goes, uint8 [3, T, size, size] or planes [T, size * size * 3 / 2]; of pixel_format native, at
            the beginning of [T * size * size * 3].
        colours: those of its manifest.

    Returns:
        Its class id, and what its planes are where pixel_format is native.

    Raises:
        DataError: the video does not decode.
    """
    indices = sampling.train_indices(sample.frames, s.frames, s.stride, s.sampling, rng)
    flip = bool(rng.random() < s.flip) and flipped is not None
    box = sampling.train_box(sample.height, sample.width, s.crop_scale, s.crop_ratio, rng)
    label = flipped if flip and flipped is not None else sample.class_id
    view, video = View(indices, box), info_of(sample, colours)
    if s.pixel_format == "native":
        return label, decode_crop(data, view, video, size=s.size, flip=flip, out=out)
    decode_views(data, [view], video, size=s.size, flip=flip, pixel_format=s.pixel_format, out=out[None])
    return label, None


def view_format(s: DataSettings) -> str:
    """Tell the form of test views: that of `s`, but for native, whose views are planes resized as with yuv."""
    return "yuv" if s.pixel_format == "native" else s.pixel_format


def video_views(data: bytes, video: VideoInfo, s: DataSettings, clips: int, crops: int, out: Tensor | None = None) -> Tensor:
    """Cut the test views out of a video, uint8 [clips * crops, 3, T, size, size] or planes
    [clips * crops, T, size * size * 3 / 2], as `view_format` says; clip by clip.

    Several crops are cut at full short side (`size` pixels of it, as published); a single one is the centre
    `size / short_side` of the frame. They are written into `out` where it is given.

    Raises:
        DataError: the video does not decode.
    """
    times = sampling.test_indices(video.frames, s.frames, s.stride, s.sampling, clips)
    boxes = sampling.test_boxes(video.height, video.width, s.size, s.size if crops > 1 else s.short_side, crops)
    return decode_views(
        data,
        [View(t, box) for t in times for box in boxes],
        video,
        size=s.size,
        pixel_format=view_format(s),
        out=out,
    )
