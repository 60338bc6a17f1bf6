"""Frames of sharded videos as small JPEG pictures, for pages that show them."""

from __future__ import annotations

from dataclasses import dataclass

import av.error

from vswin_dist import storage
from vswin_dist.errors import DataError, StorageError
from vswin_dist.manifest import Manifest, Sample, shard_url
from vswin_dist.video import Video, VideoError, jpeg


@dataclass(frozen=True)
class PictureTask:
    """`count` evenly spaced frames of one sample, `width` pixels wide."""

    url: str
    sample: Sample
    count: int
    width: int


def pictures(task: PictureTask) -> list[str]:
    """Make the frames as `data:` URLs; those before the first that cannot be read."""
    sample = task.sample
    wanted = {int((i + 0.5) * sample.frames / task.count) for i in range(task.count)}
    made = []
    try:
        data = storage.read_range(task.url, sample.offset, sample.size)
        with Video(data) as video:
            for number, frame in enumerate(video.frames()):
                if number in wanted:
                    made.append(jpeg(frame, task.width))
                if number >= max(wanted):
                    break
    except (av.error.FFmpegError, VideoError, DataError, StorageError, OSError):
        return made
    return made


def tasks_for(manifest: Manifest, url: str, samples: list[Sample], count: int, width: int) -> list[PictureTask]:
    """Picture tasks of `samples`."""
    return [PictureTask(shard_url(url, manifest.shards[s.shard]), s, count, width) for s in samples]
