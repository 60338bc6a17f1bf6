"""The command `data-prep`. Exit codes: 0 done (also with rejected videos, listed), 1 the work failed, 2 bad input."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep import sources
from data_prep.executor import Executor, LocalExecutor
from data_prep.progress import say
from data_prep.settings import PROFILES, Encoding, PrepSettings, parse_size
from vswin_dist import storage
from vswin_dist.errors import ConfigError, before_start, run_command
from vswin_dist.manifest import SAMPLINGS, Manifest, manifest_url, read_manifest

LEAST_MEMORY = 64 << 20  # bytes; an idle worker takes 30 MB


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    root = argparse.ArgumentParser(prog="data-prep", description="Videos to WebDataset shards with a manifest.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shard = commands.add_parser("shard", help="verify, encode and pack the videos of a source")
    kinds = shard.add_subparsers(dest="kind", required=True, metavar="SOURCE")
    for name, kind in sources.KINDS.items():
        one = kinds.add_parser(
            name,
            help=(sys.modules[kind.__module__].__doc__ or "").split("\n")[0],
            description=sys.modules[kind.__module__].__doc__,
        )
        kind.add_arguments(one)
        add_shard_arguments(one)
        one.set_defaults(run=shard_command)
    verify = commands.add_parser("verify", help="hold the shards against their manifest")
    verify.add_argument("url", help="folder of the shards, or the manifest")
    verify.add_argument("--repair", action="store_true", help="rebuild missing and damaged shards from the source")
    add_workers(verify)
    verify.set_defaults(run=verify_command)
    retry = commands.add_parser("retry", help="process the rejected videos of a dataset once more")
    retry.add_argument("url", help="folder of the shards")
    add_workers(retry)
    retry.set_defaults(run=retry_command)
    merge = commands.add_parser("merge", help="join datasets under one manifest; no shard is moved")
    merge.add_argument("out", help="folder of the new manifest")
    merge.add_argument("urls", nargs="+", metavar="URL", help="folders of the datasets")
    merge.add_argument("--name", default="dataset", help="name kept in the manifest (%(default)s)")
    merge.add_argument("--split", default="train", help="split kept in the manifest (%(default)s)")
    merge.set_defaults(run=merge_command)
    preview = commands.add_parser("preview", help="write a contact sheet of a few videos as one HTML file")
    preview.add_argument("url", help="folder of the shards, or the manifest")
    preview.add_argument("--out", default="preview.html", metavar="URL", help="(%(default)s)")
    preview.add_argument("--count", type=int, default=24, metavar="N", help="videos shown (%(default)s)")
    add_workers(preview)
    preview.set_defaults(run=preview_command)
    stats = commands.add_parser("stats", help="print what a dataset holds")
    stats.add_argument("url", help="folder of the shards, or the manifest")
    stats.set_defaults(run=stats_command)
    return root


def add_workers(to: argparse.ArgumentParser) -> None:
    """Declare `--workers`."""
    to.add_argument("--workers", type=int, metavar="N", help="local processes (the machine's cores)")


def add_shard_arguments(to: argparse.ArgumentParser) -> None:
    """Declare the options that every kind of source has."""
    to.add_argument("--out", required=True, metavar="URL", help="folder of the shards, on any file system of fsspec")
    to.add_argument(
        "--classes",
        metavar="FILE|MANIFEST",
        help="class names in the order of their ids: a text file, one a line, or a manifest",
    )
    to.add_argument("--name", default="dataset", help="name kept in the manifest (%(default)s)")
    to.add_argument("--split", default="train", help="split kept in the manifest (%(default)s)")
    to.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        help="how clips are to be taken from these videos in training, kept in the manifest (uniform for ssv2, else dense)",
    )
    defaults = Encoding()
    to.add_argument("--profile", default="train", help=f"one of {', '.join(PROFILES)} (%(default)s)")
    to.add_argument("--short-side", type=int, default=defaults.short_side, metavar="PIXELS", help="(%(default)s)")
    to.add_argument(
        "--keyframe-interval", type=int, default=defaults.keyframe_interval, metavar="FRAMES", help="(%(default)s)"
    )
    to.add_argument("--crf", type=int, default=defaults.crf, help="x264's quality, lower is better (%(default)s)")
    to.add_argument("--max-fps", type=float, default=defaults.max_fps, metavar="RATE", help="cap of the frame rate (none)")
    to.add_argument("--min-frames", type=int, default=defaults.min_frames, metavar="N", help="(%(default)s)")
    to.add_argument("--min-side", type=int, default=defaults.min_side, metavar="PIXELS", help="(%(default)s)")
    to.add_argument(
        "--max-bad",
        type=float,
        default=defaults.max_bad,
        metavar="FRACTION",
        help="fraction of lost or damaged frames that is let pass (%(default)s)",
    )
    to.add_argument("--keep-duplicates", action="store_true", help="keep videos whose bytes were seen before")
    to.add_argument("--shard-size", default="256MB", metavar="SIZE", help="target bytes of a shard (%(default)s)")
    to.add_argument("--shard-count", type=int, default=10_000, metavar="N", help="samples of a shard at most (%(default)s)")
    to.add_argument("--seed", type=int, default=0, help="of the order of the samples (%(default)s)")
    to.add_argument(
        "--window",
        type=int,
        default=2000,
        metavar="N",
        help="videos that are shuffled together where the source is archives (%(default)s)",
    )
    to.add_argument("--dry-run", action="store_true", help="say what would be done, with an estimate; write nothing")
    to.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="work on this Ray cluster (auto, ray://..., HOST:PORT), "
        "on all its nodes; out, and work if given, must be reachable from all",
    )
    to.add_argument(
        "--work",
        metavar="URL",
        help="folder for samples that wait to be packed (beside the shards, or below VSWIN_HOME where these are remote)",
    )
    add_workers(to)
    to.add_argument(
        "--worker-memory", metavar="SIZE", help="of a worker; a video that needs more is rejected (its part of 0.8 of all)"
    )


def settings_from(arguments: argparse.Namespace) -> PrepSettings:
    """Make the settings that the options ask for."""
    encoding = Encoding(
        arguments.profile,
        arguments.short_side,
        arguments.keyframe_interval,
        arguments.crf,
        max_fps=arguments.max_fps,
        min_frames=arguments.min_frames,
        min_side=arguments.min_side,
        max_bad=arguments.max_bad,
    )
    return PrepSettings(
        encoding,
        parse_size(arguments.shard_size),
        arguments.shard_count,
        arguments.seed,
        arguments.window,
        arguments.keep_duplicates,
        arguments.name,
        arguments.split,
        arguments.sampling or "dense",
    )


def check_workers(workers: int | None) -> None:
    """Refuse fewer than one worker."""
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {workers}")


def worker_memory_from(text: str | None) -> int | None:
    """Parse `--worker-memory`, and refuse what a worker takes without a video."""
    if text is None:
        return None
    if (size := parse_size(text)) < LEAST_MEMORY:
        raise ConfigError(f"--worker-memory must be at least {LEAST_MEMORY >> 20}MiB, not {text}")
    return size


def shard_command(arguments: argparse.Namespace) -> int:
    """`data-prep shard`."""
    from data_prep import journal
    from data_prep.pipeline import list_source, shard_dataset

    check_workers(arguments.workers)
    memory = worker_memory_from(arguments.worker_memory)
    settings = settings_from(arguments)
    with before_start():
        source = sources.KINDS[arguments.kind].from_arguments(arguments)
        classes = sources.read_classes(arguments.classes) if arguments.classes else None
        if arguments.dry_run:
            from data_prep.estimate import estimate

            preparation = list_source(source, storage.absolute(arguments.out), settings, classes, arguments.work)
            journal.check_specification(preparation.out, preparation.specification)
            say(preparation.listing.notes)
            print("\n".join(estimate(preparation).lines(arguments.workers or os.cpu_count() or 1)))
            return 0
    work = arguments.work
    if arguments.ray and not work:
        work = journal.folder(storage.absolute(arguments.out))  # where every node finds it
    manifest = shard_dataset(
        source,
        arguments.out,
        settings,
        classes=classes,
        work=work,
        executor=lambda: start_workers(arguments.workers, arguments.ray, memory),
    )
    print_result(manifest, arguments.out)
    return 0


def start_workers(workers: int | None, ray_address: str | None, worker_memory: int | None) -> Executor:
    """Start local processes, or connect to the Ray cluster at `ray_address`."""
    if ray_address is None:
        return LocalExecutor(workers, worker_memory)
    from data_prep.ray_executor import RayExecutor

    return RayExecutor(ray_address, workers, worker_memory)


def print_result(manifest: Manifest, out: str) -> None:
    """Print the rejected videos on stderr, the counts on stdout."""
    from data_prep.report import reject_list
    from data_prep.report_html import human_bytes

    for line in reject_list(manifest):
        print(line, file=sys.stderr)
    filled = set(np.unique(manifest.samples.numbers("class_id")).tolist())
    if empty := [name for i, name in enumerate(manifest.classes) if i not in filled]:
        say([f"{len(empty):,} of {len(manifest.classes):,} classes hold no video: {sources.some(empty)}"])
    counts = manifest.counts
    total = human_bytes(sum(s.bytes for s in manifest.shards))
    print(
        f"{out}: read {counts['read']:,} = kept {counts['kept']:,} + rejected {counts['rejected']:,}; "
        f"{len(manifest.classes)} classes, {len(manifest.shards):,} shards, {total}, "
        f"fingerprint {manifest.fingerprint}"
    )


def verify_command(arguments: argparse.Namespace) -> int:
    """`data-prep verify`."""
    from data_prep.verify import verify_dataset

    check_workers(arguments.workers)
    if arguments.repair:
        from data_prep.repair import repair

        rebuilt, wrong = repair(arguments.url, arguments.workers)
        for problem in (p for problems in wrong.values() for p in problems):
            print(problem)
        for name in rebuilt:
            print(f"{name}: rebuilt")
    wrong = verify_dataset(arguments.url, arguments.workers)
    for problem in (p for problems in wrong.values() for p in problems):
        print(problem)
    manifest = read_manifest(arguments.url)
    damaged = sum(number >= 0 for number in wrong)
    print(
        f"{len(manifest.shards) - damaged:,} of {len(manifest.shards):,} shards are as the manifest says, "
        f"{len(manifest.samples):,} videos in all"
    )
    return 1 if wrong else 0


def retry_command(arguments: argparse.Namespace) -> int:
    """`data-prep retry`."""
    from data_prep.report import refresh_reports
    from data_prep.retry import retry

    check_workers(arguments.workers)
    with before_start():
        before = read_manifest(arguments.url).counts
    manifest = retry(arguments.url, arguments.workers)
    folder = manifest_url(storage.absolute(arguments.url)).rpartition("/")[0]
    refresh_reports(manifest, folder, arguments.workers or os.cpu_count() or 1)
    print(f"{manifest.counts['kept'] - before['kept']:,} of {before['rejected']:,} rejected videos are kept now")
    print_result(manifest, arguments.url)
    return 0


def merge_command(arguments: argparse.Namespace) -> int:
    """`data-prep merge`."""
    from data_prep.merge import merge

    with before_start():  # it writes the manifest alone, last
        print_result(merge(arguments.out, arguments.urls, arguments.name, arguments.split), arguments.out)
    return 0


def preview_command(arguments: argparse.Namespace) -> int:
    """`data-prep preview`."""
    from data_prep.report import write_preview

    check_workers(arguments.workers)
    shown = write_preview(arguments.url, arguments.out, arguments.count, arguments.workers or os.cpu_count() or 1)
    print(f"{arguments.out}: {shown} videos")
    return 0


def stats_command(arguments: argparse.Namespace) -> int:
    """`data-prep stats`."""
    from data_prep.report import stats_table

    with before_start():
        print(stats_table(read_manifest(arguments.url)))
    return 0


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = parser().parse_args(argv)

    def run() -> int:
        for value in vars(arguments).values():
            for text in value if isinstance(value, list) else [value]:
                sources.check_url(str(text))
        return int(arguments.run(arguments))

    return run_command(run)


def entry_point() -> None:
    """Run the console script. A polite kill ends the workers too."""
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
