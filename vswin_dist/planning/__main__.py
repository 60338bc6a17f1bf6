"""Plan a training's capacity: `python -m vswin_dist.planning --recipe NAME --gpus N --gpu KIND key=value ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from vswin_dist.config import Settings, load_settings, recipe_names
from vswin_dist.errors import ConfigError, nearest, run_command
from vswin_dist.planning.hardware import GPUS, SOURCES, Coefficients

KINETICS_400 = (240_436, 400)  # training videos and classes that were published; taken where no data.train is given


def main() -> int:
    """Print the plan, and draw it where `--picture` says."""
    parser = argparse.ArgumentParser(prog="python -m vswin_dist.planning", description=__doc__)
    parser.add_argument("--recipe", required=True, help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--gpus", type=int, default=8, help="to plan for (default: 8)")
    parser.add_argument("--gpu", default="h100-80", help=f"their kind: {', '.join(GPUS)} (default: h100-80)")
    parser.add_argument(
        "--samples",
        type=int,
        help="videos of the training set, of which data.subset are taken (default: those of data.train where that is "
        "given, else 240,436)",
    )
    parser.add_argument("--classes", type=int, help="its classes (default: those of data.train, else 400)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw clips a second over the number of GPUs")
    for f in fields(Coefficients):
        kind = int if isinstance(f.default, int) else float
        parser.add_argument(f"--{f.name.replace('_', '-')}", type=kind, default=f.default, help=SOURCES[f.name])
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    args = parser.parse_args()
    if args.gpu not in GPUS:
        raise ConfigError(f"--gpu {args.gpu} is not known.{nearest(args.gpu, GPUS)} There are {', '.join(GPUS)}.")
    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: a training takes one GPU or more")
    settings, known = read_settings(args.recipe, args.settings)
    coefficients = Coefficients(**{f.name: getattr(args, f.name) for f in fields(Coefficients)})
    samples, classes, clip_bytes = dataset(settings) if known else (*KINETICS_400, None)
    if args.samples or not known:
        samples = max(1, round(settings.data.subset * (args.samples or samples)))
    if clip_bytes:
        coefficients = replace(coefficients, clip_bytes=clip_bytes)

    from vswin_dist.planning.plan import CapacityPlan

    plan = CapacityPlan.make(settings, args.gpu, args.gpus, samples, args.classes or classes, coefficients)
    print(plan)
    if args.picture:
        plan.draw(Path(args.picture))
        print(f"picture: {args.picture}")
    return 0


def read_settings(recipe: str, overrides: Sequence[str]) -> tuple[Settings, bool]:
    """Load the settings; False: neither the recipe nor `overrides` give data.train, which is `none` then."""
    try:
        return load_settings(recipe, overrides), True
    except ConfigError:  # for another reason, it comes again
        return load_settings(recipe, ["data.train=none", *overrides]), False


def dataset(settings: Settings) -> tuple[int, int, float]:
    """Return the samples that a training takes of data.train, the set's classes, and the mean bytes of its samples."""
    from vswin_dist.data.plan import make_plan
    from vswin_dist.manifest import read_manifest

    data, manifest = settings.data, read_manifest(settings.data.train)
    plan = make_plan(manifest, data, settings.run.seed, data.repeats)  # the smallest batch: only its samples are counted
    return plan.epoch_samples, len(manifest.classes), float(manifest.samples.numbers("size").mean())


if __name__ == "__main__":
    sys.exit(run_command(main))
