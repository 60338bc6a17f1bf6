"""How models are to be scored: the options that all jobs which score have in common. Imports nothing heavy, for `--help`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from vswin_dist.errors import at_least


@dataclass(frozen=True)
class Asked:
    """How models are scored."""

    data: str | None  # URL of the shards
    clips: int | None  # None: as each model's recipe says
    crops: int | None
    batch: int
    workers: int
    ranks: int
    use_gpu: bool
    storage_root: str | None
    tracking_uri: str | None
    s3_endpoint: str | None


def add_options(parser: argparse.ArgumentParser, whose: str) -> None:
    """Add the options of `Asked` but `--data`; the views are else those of `whose` recipe."""
    parser.add_argument("--clips", type=int, default=None, help=f"views in time; else as {whose} recipe says")
    parser.add_argument("--crops", type=int, default=None, help=f"views in space; else as {whose} recipe says")
    parser.add_argument("--batch", type=int, default=8, help="views in one forward pass")
    parser.add_argument("--ranks", type=int, default=1, help="processes; more than one run on the Ray cluster")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each rank")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes of each rank")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("--s3-endpoint", default=None)
    where = "where predictions are kept, and Ray's state meanwhile; needed where the cluster has several nodes"
    parser.add_argument("--storage-root", default=None, metavar="URL", help=where)


def read_options(args: argparse.Namespace, **counts: int | None) -> Asked:
    """Take `Asked` from parsed options.

    Args:
        counts: further options that must be 1 or more, where they are given.

    Raises:
        ConfigError: a number is below its least value; names the option.
    """
    counts |= {"clips": args.clips, "crops": args.crops, "batch": args.batch, "ranks": args.ranks}
    at_least(1, **{name: value for name, value in counts.items() if value is not None})
    at_least(0, workers=args.workers)
    return Asked(
        data=args.data,
        clips=args.clips,
        crops=args.crops,
        batch=args.batch,
        workers=args.workers,
        ranks=args.ranks,
        use_gpu=args.gpu,
        storage_root=args.storage_root,
        tracking_uri=args.tracking_uri,
        s3_endpoint=args.s3_endpoint,
    )
