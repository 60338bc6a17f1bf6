"""Measure speed and memory, with peers in the same run."""

import argparse
import importlib
import sys
from pathlib import Path

from vswin_dist.errors import ConfigError, nearest, run_command

BENCHMARKS = {  # modules of vswin_dist.benchmarks -> what they measure
    "model": "forward, training step and memory of a model, beside torchvision's and a plain reference",
    "prep": "encoding and packing of videos, and reading of their clips, beside ffmpeg and tar",
    "rows": "listing, ordering, journaling and assembling of up to ten million rows in data_prep's driver",
    "manifest": "opening of manifests of up to ten million samples, their memory in the processes of a node, the plan",
    "planning": "peak memory and step time of training, predicted and measured, for eight settings on two CPU ranks",
    "overhead": "what Ray, DeepSpeed, the loader and MLflow add to a step, beside plain PyTorch and torchrun",
    "scaling": "what more ranks of a Ray cluster read and train in a second, each with the same load",
    "rendezvous": "how long thousands of ranks take to meet at one store",
    "loader": "fetching, decoding and augmenting of clips on one core, beside the usual readers",
    "serving": "requests per second and latency of a served model, beside MLflow's server, with broken videos",
    "views": "scoring of all views of a video together, beside one view at a time",
    "checkpoint": "the stall of a checkpoint written in the background, beside one that the steps wait for",
}


def main() -> int:
    listed = "\n".join(f"  {name:10} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"benchmarks:\n{listed}\n\n%(prog)s BENCHMARK --help shows the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", metavar="BENCHMARK", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="its options")
    args = parser.parse_args()
    if args.benchmark not in BENCHMARKS:
        hint = nearest(args.benchmark, BENCHMARKS)
        raise ConfigError(f"{args.benchmark!r} is not a benchmark.{hint} There are {', '.join(BENCHMARKS)}.")
    sys.path.append(str(Path(__file__).parents[1]))  # some of them build on what tests have, which is not installed
    return importlib.import_module(f"vswin_dist.benchmarks.{args.benchmark}").main(args.options) or 0


if __name__ == "__main__":
    sys.exit(run_command(main))
