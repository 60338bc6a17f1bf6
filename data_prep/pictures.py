"""Frames of sharded videos as small JPEG pictures, for the report and the contact sheet."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import av
import av.error

from vswin_dist import storage
from vswin_dist.errors import DataError
from vswin_dist.manifest import Manifest, Sample, shard_url


@dataclass(frozen=True)
class PictureTask:
    """`count` evenly spaced frames of one sample, `width` pixels wide."""

    url: str
    sample: Sample
    count: int
    width: int


def pictures(task: PictureTask) -> list[str]:
    """The frames as ``data:`` URLs; none where the video cannot be read."""
    sample = task.sample
    wanted = {int((i + 0.5) * sample.frames / task.count) for i in range(task.count)}
    made = []
    try:
        data = storage.read_range(task.url, sample.offset, sample.size)
        with av.open(io.BytesIO(data)) as video:
            for number, frame in enumerate(video.decode(video=0)):
                if number in wanted:
                    made.append(jpeg(frame, task.width))
                if number >= max(wanted):
                    break
    except (av.error.FFmpegError, DataError, OSError):
        return made
    return made


def jpeg(frame: av.VideoFrame, width: int) -> str:
    """One frame as the ``data:`` URL of a JPEG."""
    height = max(2, round(frame.height * width / frame.width / 2) * 2)
    small = frame.reformat(width, height, "yuvj420p")
    small.pts, small.pict_type = 0, 0  # type: ignore[assignment]
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"  # type: ignore[attr-defined]
    encoder.options = {"qscale": "5"}
    encoder.thread_count = 1
    packets = [*encoder.encode(small), *encoder.encode(None)]  # type: ignore[attr-defined]
    return "data:image/jpeg;base64," + base64.b64encode(b"".join(bytes(p) for p in packets)).decode()


def first_of_classes(manifest: Manifest, each: int) -> list[Sample]:
    """The first `each` samples of every class, in the order of the classes."""
    found: dict[int, list[Sample]] = {}
    for sample in manifest.samples:
        group = found.setdefault(sample.class_id, [])
        if len(group) < each:
            group.append(sample)
    return [sample for _, group in sorted(found.items()) for sample in group]


def tasks_for(manifest: Manifest, url: str, samples: list[Sample], count: int, width: int) -> list[PictureTask]:
    """Picture tasks of `samples`."""
    return [PictureTask(shard_url(url, manifest.shards[s.shard]), s, count, width) for s in samples]
