"""Train: `python jobs/train.py --recipe NAME key=value ...`, or the same through `ray job submit`."""

import argparse
import sys

from vswin_dist.config import load_settings, recipe_names, recipe_text
from vswin_dist.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("--dry-run", action="store_true", help="check everything, the cluster's nodes too, and stop")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    args = parser.parse_args()
    settings = load_settings(args.recipe, args.settings)

    from vswin_dist.training.preflight import preflight

    spec = preflight(settings)
    print(spec.summary(), flush=True)
    if args.dry_run:
        from vswin_dist.training.dry_run import dry_run
        from vswin_dist.training.node_checks import refuse, table

        checks = dry_run(spec)
        print(table(checks), flush=True)
        refuse(checks)
        return 0
    from vswin_dist.serving import PYFUNC_CODE
    from vswin_dist.training.launch import train

    result = train(recipe_text(args.recipe), spec, PYFUNC_CODE)
    for key, value in result.items():
        print(f"{key:24} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
