"""A view as `data.pixel_format=native` makes it, on both sides of the way to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from vswin_dist.data.transforms.resample import crops_to_rgb
from vswin_dist.data.video.decode import View, clip_shape, decode_crop
from vswin_dist.data.video.stored_crop import Crop
from vswin_dist.video import VideoInfo


def native_view(data: bytes, view: View, video: VideoInfo, *, size: int, flip: bool = False) -> tuple[Crop, Tensor]:
    """What the loader sends, and the RGB that it becomes: uint8 [1, 3, T, S, S]."""
    frames = len(view.indices)
    out = torch.empty(clip_shape(frames, size, "native"), dtype=torch.uint8)
    crop = decode_crop(data, view, video, size=size, flip=flip, out=out)
    return crop, crops_to_rgb(out[: frames * crop.bytes], [crop], frames, size)
