"""Multi-view scoring of videos, all views of a video together, beside one view at a time, in one process.

One at a time: a video is read and decoded for each of its views, which goes through the model alone, as an evaluation of a
single view does it, as often as there are views. Between the two: decoded once, the model by single views.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vswin_dist.config.schema import DataSettings
from vswin_dist.data import sampling
from vswin_dist.data.clips import info_of
from vswin_dist.data.plan import evaluation_batches
from vswin_dist.data.shard_reader import Members
from vswin_dist.data.transforms.normalise import normalise
from vswin_dist.data.video.decode import View, decode_views
from vswin_dist.errors import at_least
from vswin_dist.evaluation.evaluate import Scorer, Views
from vswin_dist.manifest import Manifest, read_manifest
from vswin_dist.models import build_model

TOGETHER, ONE_FORWARD, ONE_VIEW = "all views together", "decoded once, forward by view", "one view at a time"


@dataclass(frozen=True)
class Work:
    """What is scored: the first `videos` of a set."""

    model: torch.nn.Module
    manifest: Manifest
    data: DataSettings
    views: Views
    videos: int
    device: torch.device

    def together(self, batch: int) -> None:
        """Score as an evaluation does, `batch` views in a forward pass."""
        views = Views(self.views.clips, self.views.crops, batch)
        batches, _ = evaluation_batches(self.videos, 0, 1, views.videos)
        scorer = Scorer(self.model, self.manifest, self.data.train, self.data, views, self.device, torch.float32)
        assert sum(len(found.indices) for found in scorer.rounds(batches, len(batches))) == self.videos

    @torch.no_grad()
    def one_view(self) -> None:
        """Score by single views, each from the video's bytes on."""
        d, v = self.data, self.views
        members = Members(self.manifest, d.train, 0.0)
        for index in range(self.videos):
            video = info_of(self.manifest.samples[index])
            side = d.size if v.crops > 1 else d.short_side
            times = sampling.test_indices(video.frames, d.frames, d.stride, d.sampling, v.clips)
            boxes = sampling.test_boxes(video.height, video.width, d.size, side, v.crops)
            for view in (View(t, box) for t in times for box in boxes):
                clip = decode_views(members.read(index), [view], video, size=d.size, pixel_format=d.pixel_format)
                logits = self.model(normalise(clip.to(self.device), d.mean, d.std, torch.float32))
                logits.float().softmax(1).cpu()
        members.close()


def seconds(work: Work, batch: int, turns: int) -> dict[str, list[float]]:
    """Time each way, in turns, after one that warms up: name -> seconds, on a CPU those of this process's computing."""
    clock = time.process_time if work.device.type == "cpu" else time.perf_counter  # others may compute there, too
    ways: dict[str, Callable[[], None]] = {
        TOGETHER: lambda: work.together(batch),
        ONE_FORWARD: lambda: work.together(1),
        ONE_VIEW: work.one_view,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            began = clock()
            way()
            if turn:
                found[name].append(clock() - began)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="benchmark.py views", description=__doc__)
    parser.add_argument("data", metavar="URL", help="shards")
    parser.add_argument("--model", default="swin_nano", help="preset; random weights")
    parser.add_argument("--frames", type=int, default=16, help="of a clip, neighbours")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--crops", type=int, default=3)
    parser.add_argument("--batch", type=int, default=None, help="views in one forward pass; else those of a video")
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args(argv)
    at_least(1, frames=args.frames, size=args.size, clips=args.clips, crops=args.crops, videos=args.videos, turns=args.turns)
    manifest, device = read_manifest(args.data), torch.device("cuda" if args.gpu else "cpu")
    data = DataSettings(
        train=args.data, sampling="dense", frames=args.frames, stride=1, size=args.size, short_side=args.size, workers=0
    )
    model = build_model(args.model, num_classes=len(manifest.classes)).eval().to(device)
    views = Views(args.clips, args.crops, args.batch or args.clips * args.crops)
    work = Work(model, manifest, data, views, min(args.videos, len(manifest.samples)), device)
    found = seconds(work, views.batch, args.turns)
    print(f"{args.model}, {work.videos} videos, {args.clips} x {args.crops} views, {device}")
    slowest = statistics.median(found[ONE_VIEW])
    for name, times in found.items():
        rates = [work.videos * views.of_a_video / t for t in times]
        print(
            f"{name:30} {statistics.median(rates):8.1f} views/s ({min(rates):.1f} to {max(rates):.1f}), "
            f"{slowest / statistics.median(times):.2f} x"
        )
    return 0
