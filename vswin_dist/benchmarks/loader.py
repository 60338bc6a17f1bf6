"""Speed of feeding on one core, beside the readers that one would use otherwise, in one process and taking turns.

`python jobs/benchmark.py loader SOURCE ...`: each source is a folder of videos with index.csv (first column: the
path) or the URL of shards. Prints tables, then one JSON. See `measure` for what is measured.

`--against URL` compares the first pass over the one source with that over the same shards elsewhere, for instance over
S3 with 50 ms to each answer (SHARDS stands below FOLDER/bucket; two terminals, or `&`)::

    rclone serve s3 --addr 127.0.0.1:9000 --auth-key key,secret FOLDER
    python -m tests.support.bad_network 9000 9001 0.05
    AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_ENDPOINT_URL_S3=http://127.0.0.1:9001 python \\
        jobs/benchmark.py loader FOLDER/bucket/SHARDS --against s3://bucket/SHARDS --workers 2
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from vswin_dist import storage
from vswin_dist.benchmarks import feeding as costs
from vswin_dist.benchmarks import readers as br
from vswin_dist.config.schema import DataSettings
from vswin_dist.data import sampling
from vswin_dist.data.clips import info_of
from vswin_dist.data.loader import TrainLoader
from vswin_dist.data.plan import Plan
from vswin_dist.data.shard_reader import Members
from vswin_dist.data.transforms.augment import augment
from vswin_dist.data.transforms.normalise import normalise, to_rgb
from vswin_dist.data.video.decode import View, decode_views, video_info
from vswin_dist.errors import ConfigError, DataError
from vswin_dist.manifest import read_manifest
from vswin_dist.video import VideoInfo

STAGES = ("fetch", "decode", "convert", "augment", "collate", "normalise")
MOST_VIDEOS = 50


@dataclass(frozen=True)
class SourceVideo:
    """One video of a source: how its bytes are fetched, and what is known of it."""

    fetch: Callable[[], bytes]
    info: VideoInfo


def videos(source: str) -> list[SourceVideo]:
    """At most `MOST_VIDEOS` of a folder with index.csv, or of shards.

    Raises:
        DataError: neither is there, or a video does not decode.
    """
    index = Path(source, "index.csv")
    if not index.exists():
        manifest = read_manifest(source)
        members = Members(manifest, source)
        return [
            SourceVideo(lambda i=i: members.read(i), info_of(s, manifest.colours))  # type: ignore[misc]
            for i, s in enumerate(manifest.samples[:MOST_VIDEOS])
        ]
    with index.open(newline="") as file:
        paths = [str(index.parent / next(iter(row.values()))) for row in csv.DictReader(file)][:MOST_VIDEOS]
    if not paths:
        raise DataError(f"{index} names no video")
    return [
        SourceVideo(lambda p=p: storage.read_bytes(p), video_info(storage.read_bytes(p), p))  # type: ignore[misc]
        for p in paths
    ]


def clips_of(found: list[SourceVideo], count: int, s: DataSettings) -> list[tuple[SourceVideo, br.Clip]]:
    """`count` random training clips, by turns of the videos; the same in every run."""
    made = []
    for n in range(count):
        member, rng = found[n % len(found)], np.random.default_rng([0, n])
        video = member.info
        indices = sampling.train_indices(video.frames, s.frames, s.stride, s.sampling or "dense", rng)
        box = br.cut_box(sampling.train_box(video.height, video.width, s.crop_scale, s.crop_ratio, rng))
        made.append((member, br.Clip(View(indices, box), bool(rng.random() < s.flip), s.size, video)))
    return made


def measure(source: str, s: DataSettings, count: int, repeats: int, with_peers: bool) -> dict[str, Any]:
    """Measure processor seconds for one clip: what a core must do, whatever else runs, without waits for storage.

    Every reader reads the same clips from the same bytes, one after another as a loader does, and the readers take turns;
    a result is the mean over the clips of the median of `repeats` rounds. It is of the fetch (a file, or a shard's member
    and its checksum; of the plain way a sample from webdataset), of opening the video, decoding, crop and resize;
    libav's is of decoding alone.
    """
    plan = clips_of(videos(source), count, s)
    taken = [(member.fetch(), clip) for member, clip in plan]
    found, missing = br.readers(with_peers)
    runs: dict[str, Callable[[int], float]] = {"fetch": lambda n: _timed(plan[n][0].fetch)[1], **_stages(taken, s)}
    runs |= {name: lambda n, reader=reader: _timed(reader(*taken[n]))[1] for name, reader in found.items()}  # type: ignore[misc]
    stream = br.webdataset_stream(source)
    if stream and br.PLAIN in found:
        runs["webdataset"] = lambda n: _timed(lambda: next(stream))[1]
    times: dict[str, list[list[float]]] = {name: [[] for _ in plan] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            for number in range(count):
                seconds = run(number)
                if turn:  # the first turn warms up
                    times[name][number].append(seconds)
    mean = {name: float(np.mean([median(runs) for runs in rows])) for name, rows in times.items()}
    for name in found:
        if name != br.LIMIT:
            mean[name] += mean["webdataset" if name == br.PLAIN and "webdataset" in mean else "fetch"]
    ours = mean[next(name for name, form in br.OURS.items() if form == s.pixel_format)]
    mean["convert"] = max(ours - mean["fetch"] - mean["decode"], 0.0)
    return {
        "source": source,
        "clips": count,
        "repeats": repeats,
        "readers_s": {name: mean[name] for name in found},
        "stages_s": {name: mean[name] for name in STAGES},
        "missing": missing,
    }


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    made = run()
    return made, time.process_time() - began


def _stages(taken: list[tuple[bytes, br.Clip]], s: DataSettings) -> dict[str, Callable[[int], float]]:
    """Stage -> the seconds of it that clip number n takes, for the stages that reading alone does not tell apart."""
    shown, (data, clip) = "rgb" if s.pixel_format == "rgb" else "yuv", taken[0]
    made = decode_views(data, [clip.view], clip.video, size=clip.size, flip=clip.flip, pixel_format=shown)
    strong = replace(s, rand_augment_ops=4, rand_augment_magnitude=7, erasing=0.25)  # the published recipe of SSv2
    rgb = to_rgb(made)[0]
    return {
        "decode": lambda n: _timed(lambda: br.frames_alone(*taken[n]))[1],
        "augment": lambda n: _timed(lambda: augment(rgb, strong, np.random.default_rng(n)))[1],
        "collate": lambda n: _timed(lambda: torch.cat([made] * 4))[1] / 4,
        "normalise": lambda n: _timed(lambda: normalise(made, s.mean, s.std, torch.bfloat16))[1],
    }


def consume(url: str, s: DataSettings, clips: int, rate: float | None) -> tuple[float, float]:
    """Measure the loader with `s.workers` processes: (clips per second, fraction of the time that its consumer waited).

    Args:
        rate: clips per second that are taken; None: as many as come.
    """
    manifest = read_manifest(url)
    batch = min(4, len(manifest.samples))
    plan = Plan(manifest.fingerprint, len(manifest.samples), 0, batch)
    warm = max(1, s.workers * s.prefetch)
    batches = iter(TrainLoader(manifest, replace(s, train=url), plan, costs.ONE_RANK, batch, last=warm + clips // batch))
    for _ in range(warm):
        next(batches)
    began, waited = time.perf_counter(), 0.0
    for _ in range(clips // batch):
        asked = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - asked
        time.sleep(batch / rate if rate else 0.0)
    seconds = time.perf_counter() - began
    return clips // batch * batch / seconds, waited / seconds


def cores_needed(gpus: int, clips_per_gpu: float, seconds_per_clip: float) -> int:
    """Count the cores that a node needs for decoding to keep `gpus` fed that take `clips_per_gpu` clips per second each."""
    return math.ceil(gpus * clips_per_gpu * seconds_per_clip)


def table(result: dict[str, Any]) -> str:
    """Format the result of `measure`; speeds as multiples of each reader's, and of libav's decoding alone."""
    rows = result["readers_s"]
    ours = [rows[name] for name in br.OURS]
    lines = [(f"{result['source']} ({result['clips']} clips)", "ms/clip", "clips/s/core", *(f"{n} is" for n in br.OURS))]
    lines += [(name, f"{1e3 * t:.2f}", f"{1 / t:.1f}", *(f"{t / o:.2f}x" for o in ours)) for name, t in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join((c.ljust if i == 0 else c.rjust)(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    text.append("stages, ms/clip: " + ", ".join(f"{name} {1e3 * t:.2f}" for name, t in result["stages_s"].items()))
    text += [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(text)


def compared(results: list[dict[str, Any]]) -> list[str]:
    """Compare our speed on each source as a multiple of decord2's on every source."""
    return [
        f"{name} on {r['source']}: {other['readers_s'][br.DECORD] / r['readers_s'][name]:.2f}x decord2 + OpenCV on "
        f"{other['source']}"
        for r in results
        for name in br.OURS
        for other in results
        if br.DECORD in other["readers_s"]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Command line: print the tables, then the JSON."""
    parser = argparse.ArgumentParser(prog="benchmark.py loader", description=__doc__)
    parser.add_argument("sources", nargs="+", help="folders with index.csv, or URLs of shards")
    parser.add_argument("--clips", type=int, default=30, help="clips of each source")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--pixel-format", choices=("rgb", "yuv", "native"), default="yuv", help="of the stages and of the processes"
    )
    parser.add_argument("--workers", type=int, default=0, help="measure also so many processes, on shards")
    parser.add_argument("--rate", type=float, help="clips/s that the consumer takes; else 80%% of what it could have")
    parser.add_argument("--memory-epochs", type=int, default=0, help="measure memory over so many epochs, on shards")
    parser.add_argument("--against", metavar="URL", help="compare the first pass with that over the same shards there")
    parser.add_argument("--batch", type=int, default=8, help="clips in a batch of --against and --memory-epochs")
    parser.add_argument("--plan", type=int, nargs=2, default=(300_000, 4096), metavar=("SAMPLES", "RANKS"))
    parser.add_argument("--gpus", type=int, default=0, help="of a node, to be kept fed")
    parser.add_argument("--clips-per-gpu", type=float, default=0.0, help="clips/s that each of them takes")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args(arguments)
    s = DataSettings(
        train="",
        sampling="dense",
        frames=args.frames,
        stride=args.stride,
        size=args.size,
        pixel_format=args.pixel_format,
        workers=args.workers,
    )
    if args.against:
        return _against(replace(s, train=args.sources[0]), args)
    results = _on_one_core(lambda: [measure(x, s, args.clips, args.repeats, not args.no_peers) for x in args.sources])
    for result in results:
        print(table(result), end="\n\n")
        if args.gpus:
            for name in br.OURS:
                need = cores_needed(args.gpus, args.clips_per_gpu, result["readers_s"][name])
                result.setdefault("cores", {})[name] = need
                print(f"{args.gpus} GPUs of {args.clips_per_gpu:g} clips/s need {need} cores ({name}, this processor)")
        if args.workers and not Path(result["source"], "index.csv").exists():
            result["in_all"] = _in_all(result["source"], s, args)
    print("\n".join(compared(results)))
    plan = costs.plan_cost(*args.plan)
    print(f"{args.plan[0]:,} samples, {args.plan[1]:,} ranks: {plan}")
    print(
        json.dumps(
            {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "frames": args.frames,
                "stride": args.stride,
                "size": args.size,
                "pixel_format": args.pixel_format,
                "sources": results,
                "plan": asdict(plan),
            }
        )
    )
    return 0


def _against(data: DataSettings, args: argparse.Namespace) -> int:
    """Measure first passes over the one source and over `--against`, and print them."""
    if len(args.sources) != 1:
        raise ConfigError(f"--against compares with one source, not {len(args.sources)}")
    passes = costs.cold_passes(data, args.against, args.batch, args.repeats)
    print(f"{data.train} (here), {args.against} (there), {data.workers} processes, batches of {args.batch}\n{passes}")
    print(
        json.dumps(
            {
                "source": data.train,
                "against": args.against,
                "workers": data.workers,
                "batch": args.batch,
                "ratio": passes.ratio,
                "copied_ratio": passes.copied_ratio,
                **asdict(passes),
            }
        )
    )
    return 0


def _in_all(url: str, s: DataSettings, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the loader with processes and print it: rate, wait, the first batch, memory."""
    most, _ = consume(url, s, args.clips * 8, None)
    rate = args.rate or 0.8 * most
    taken, waiting = consume(url, s, args.clips * 8, rate)
    print(
        f"{s.workers} processes: {most:.1f} clips/s in all; a consumer of {rate:.1f} clips/s gets {taken:.1f} and waits "
        f"{waiting:.1%} of the time"
    )
    data = replace(s, train=url)
    first, late = (costs.first_batch(data, 1, step) for step in (0, 1_000_000))
    print(f"first batch: {first:.2f} s at step 0, {late:.2f} s at step 1,000,000")
    found = {
        "workers": s.workers,
        "clips_per_s": most,
        "consumer_rate": rate,
        "taken_per_s": taken,
        "wait_share": waiting,
        "first_batch_s": first,
        "late_batch_s": late,
    }
    if args.memory_epochs:
        slope = costs.memory_slope(data, min(args.batch, len(read_manifest(url).samples)), args.memory_epochs)
        print(slope)
        found |= asdict(slope)
    return found


def _on_one_core(run: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Call `run` with one thread on one core, where the system can bind to one."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        return run()
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    sys.exit(main())
