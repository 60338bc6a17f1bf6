"""From a video's bytes to the clip or the views that the model takes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vswin_dist.config.schema import DataSettings
from vswin_dist.data import sampling
from vswin_dist.data.decode import decode_frames
from vswin_dist.data.transforms import crop_resize
from vswin_dist.manifest import Sample


def train_clip(data: bytes, sample: Sample, s: DataSettings, rng: np.random.Generator) -> Tensor:
    """A random clip of a video, cropped and flipped as `rng` says, uint8 [3, T, size, size].

    Raises:
        DataError: the video does not decode.
    """
    indices = sampling.train_indices(sample.frames, s.frames, s.stride, s.sampling or "dense", rng)
    flip = bool(rng.random() < s.flip)
    box = sampling.train_box(sample.height, sample.width, s.crop_scale, s.crop_ratio, rng)
    return crop_resize(decode_frames(data, indices, sample.frames, sample.key), box, s.size, flip)


def video_views(data: bytes, frames: int, name: str, s: DataSettings, clips: int, crops: int) -> Tensor:
    """The test views of one video, uint8 [clips * crops, 3, T, size, size]; clip by clip.

    Several crops are cut at full short side (`size` pixels of it, as published); a single one is the centre
    ``size / short_side`` of the frame.

    Raises:
        DataError: the video does not decode.
    """
    times = sampling.test_indices(frames, s.frames, s.stride, s.sampling or "dense", clips)
    decoded = decode_frames(data, np.concatenate(times), frames, name)
    height, width = decoded.shape[1:3]
    boxes = sampling.test_boxes(height, width, s.size, s.size if crops > 1 else s.short_side, crops)
    return torch.stack([crop_resize(decoded[i * s.frames:(i + 1) * s.frames], box, s.size)
                        for i in range(clips) for box in boxes])
