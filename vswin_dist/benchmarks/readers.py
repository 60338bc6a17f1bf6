"""Ways to read one training clip, ours and its peers', each as the benchmark runs it. Peers are taken where they import.

A reader takes a video's bytes and a clip and returns what is to be timed; what it does before that is not.
"""

from __future__ import annotations

import functools
import importlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vswin_dist import storage
from vswin_dist.data.video import decode
from vswin_dist.data.video.crop_resize import Box
from vswin_dist.manifest import read_manifest, shard_url
from vswin_dist.video import VideoInfo

OURS = {"ours, native planes": "native", "ours, YUV planes": "yuv", "ours, RGB": "rgb"}
DECORD, TORCHCODEC, LIMIT = "decord2 + OpenCV", "torchcodec", "libav, decoding alone"
PLAIN = "plain PyAV (shards: and webdataset)"


@dataclass(frozen=True)
class Clip:
    """A clip of `video`: one view, mirrored or not."""

    view: decode.View
    flip: bool
    size: int
    video: VideoInfo

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """top, bottom, left, right in whole pixels."""
        top, left, height, width = (int(v) for v in self.view.box)
        return top, top + height, left, left + width


Reader = Callable[[bytes, Clip], Callable[[], Any]]


def readers(with_peers: bool = True) -> tuple[dict[str, Reader], dict[str, str]]:
    """Find name -> reader of those that run here, and name -> why not of the others."""
    found: dict[str, Reader] = {name: partial(ours, pixel_format=form) for name, form in OURS.items()}
    missing = {}
    wanted: dict[str, tuple[tuple[str, ...], Reader]] = {
        DECORD: (("decord", "cv2"), decord),
        TORCHCODEC: (("torchcodec.decoders",), torchcodec),
        PLAIN: ((), pyav),
    }
    for name, (modules, reader) in wanted.items() if with_peers else ():
        try:
            for module in modules:
                importlib.import_module(module)
        except (ImportError, RuntimeError, OSError) as error:  # the latter: shared libraries that do not fit
            missing[name] = str(error).strip().splitlines()[0]
            continue
        found[name] = reader
    return {**found, LIMIT: libav}, missing


def ours(data: bytes, clip: Clip, pixel_format: str) -> Callable[[], Any]:
    """Read with this package, into memory that is used again, as the loader's is."""
    shape = decode.clip_shape(len(clip.view.indices), clip.size, pixel_format)
    if pixel_format == "native":
        out = _memory(shape)
        return partial(decode.decode_crop, data, clip.view, clip.video, size=clip.size, flip=clip.flip, out=out)
    return partial(
        decode.decode_views,
        data,
        [clip.view],
        clip.video,
        size=clip.size,
        flip=clip.flip,
        pixel_format=pixel_format,
        out=_memory(shape)[None],
    )


@functools.lru_cache(maxsize=len(OURS))
def _memory(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def frames_alone(data: bytes, clip: Clip) -> int:
    """Return this package's decoding without what follows it; the number of frames."""
    return sum(1 for _ in decode.wanted_frames(data, set(clip.view.indices.tolist()), clip.video.frames))


def decord(data: bytes, clip: Clip) -> Callable[[], Any]:
    """Read as mmaction2 does: DecordInit, DecordDecode, RandomResizedCrop, Resize (bilinear), Flip, FormatShape NCTHW."""
    reader, cv2 = importlib.import_module("decord"), importlib.import_module("cv2")
    cv2.setNumThreads(0)

    def run() -> Any:
        video = reader.VideoReader(io.BytesIO(data), num_threads=1)
        whole = video.get_batch(np.minimum(clip.view.indices, len(video) - 1).tolist()).asnumpy()
        return _cut(list(whole), clip, cv2)

    return run


def _cut(whole: list[Any], clip: Clip, cv2: Any) -> Any:
    top, bottom, left, right = clip.corners
    images = [
        cv2.resize(frame[top:bottom, left:right], (clip.size, clip.size), interpolation=cv2.INTER_LINEAR) for frame in whole
    ]
    if clip.flip:
        images = [cv2.flip(image, 1) for image in images]
    return np.stack(images).transpose(3, 0, 1, 2)


def torchcodec(data: bytes, clip: Clip) -> Callable[[], Any]:
    """Read with its decoder and one thread, by the container's times; crop and resize in torch."""
    decoders = importlib.import_module("torchcodec.decoders")

    def run() -> Any:
        video = decoders.VideoDecoder(data, num_ffmpeg_threads=1, seek_mode="approximate")
        return _cut_tensor(video.get_frames_at(clip.view.indices.tolist()).data, clip)

    return run


def _cut_tensor(whole: Tensor, clip: Clip) -> Tensor:
    """uint8 [T, 3, H, W] to [3, T, S, S]."""
    top, bottom, left, right = clip.corners
    cut = F.interpolate(whole[:, :, top:bottom, left:right], size=(clip.size, clip.size), mode="bilinear")
    return (cut.flip(3) if clip.flip else cut).transpose(0, 1)


def pyav(data: bytes, clip: Clip) -> Callable[[], Any]:
    """Read as one does first with PyAV: seek, decode, whole frames to RGB, crop and resize in torch."""

    def run() -> Any:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            rate, base = stream.average_rate or 25, stream.time_base or 1
            first = int(clip.view.indices.min()) / rate
            container.seek(int(first / base) + (stream.start_time or 0), stream=stream)
            wanted, found = set(clip.view.indices.tolist()), {}
            for frame in container.decode(stream):
                number = round(float(((frame.pts or 0) - (stream.start_time or 0)) * base * rate))
                if number in wanted:
                    found[number] = frame.to_ndarray(format="rgb24")
                if number >= max(wanted):
                    break
        last = found[max(found)]
        whole = np.stack([found.get(i, last) for i in clip.view.indices.tolist()])
        return _cut_tensor(torch.from_numpy(whole).permute(0, 3, 1, 2), clip)

    return run


def libav(data: bytes, clip: Clip) -> Callable[[], int]:
    """Decode alone, the limit: each frame from the key frame to the last wanted one; packets read before, frames dropped."""
    container = av.open(io.BytesIO(data), metadata_errors="ignore")
    stream: Any = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
    times = [p.pts for p in packets]
    keys = [i for i, p in enumerate(packets) if p.is_keyframe]
    ordered = sorted(times)
    spans = decode.spans(times, keys, {ordered[i] for i in clip.view.indices.tolist()})

    def run() -> int:
        count, decoder = 0, container.streams.video[0].codec_context
        for start, stop in spans:
            for packet in [*packets[start:stop], None]:
                count += len(decoder.decode(packet))
            decoder.flush_buffers()
        return count

    return run


def webdataset_stream(source: str) -> Iterator[Any] | None:
    """Give the samples of local shards repeatedly, as stock webdataset reads them; None for a folder of videos."""
    if Path(source, "index.csv").exists() or not storage.is_local(source):
        return None
    wds = importlib.import_module("webdataset")
    shards = [shard_url(source, shard) for shard in read_manifest(source).shards]
    samples: Iterator[Any] = iter(wds.WebDataset(shards, shardshuffle=False, empty_check=False).repeat())
    return samples


def cut_box(box: tuple[float, float, float, float]) -> Box:
    """Cut off to whole pixels, so that every reader cuts the same."""
    return tuple(float(int(v)) for v in box)  # type: ignore[return-value]
