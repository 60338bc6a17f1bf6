"""Train the rows of an ablation of the paper, or of your own: `python jobs/ablate.py --table 4 key=value ...`.

Rows that are finished are not trained again, and one that was cut off resumes, so the same command completes a table.
"""

import argparse
import sys
from pathlib import Path

from vswin_dist.errors import ConfigError, WorkFailed, at_least, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    table = parser.add_mutually_exclusive_group(required=True)
    table.add_argument("--table", type=int, help="of the paper, 4 to 9")
    table.add_argument("--recipe", help="of a table of your own: a row `base`, and one for each LABEL of LABEL:key=value")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="train these alone")
    parser.add_argument("--name", default="ablation", help="trainings are called NAME_tableN_ROW or NAME_ROW (%(default)s)")
    parser.add_argument("--at-once", type=int, metavar="N", help="rows that train at a time; else as the cluster has room")
    parser.add_argument("--halve-by", type=int, metavar="ETA", help="let one of ETA rows go on at each rung (ASHA)")
    parser.add_argument("--rungs", type=int, metavar="N", help="with --halve-by, the last of which is the whole run (3)")
    parser.add_argument("--list", action="store_true", help="print the rows, and the scores there are, and stop")
    what = "settings that replace the recipes', of all rows or of some, as in 22k_*:model.init=FILE"
    parser.add_argument("settings", nargs="*", metavar="[ROWS:]key=value", help=what)
    args = parser.parse_args()
    if args.at_once is not None:
        at_least(1, **{"at-once": args.at_once})
    if args.rungs is not None and args.halve_by is None:
        raise ConfigError("--rungs divides the runs of --halve-by ETA, which is not given")
    at_least(2, **{name: value for name, value in (("halve-by", args.halve_by), ("rungs", args.rungs)) if value is not None})

    from vswin_dist.training import paper
    from vswin_dist.training.rows import complete

    given = [*(["data.train=unused"] if args.list else []), *args.settings]
    planned = paper.plan_own(args.recipe, args.rows, args.name, given) if args.recipe else None
    trials = planned or paper.plan(args.table, args.rows, args.name, given)
    if args.list:
        print(paper.comparison(trials))
        return 0
    halved = (args.halve_by, args.rungs or 3) if args.halve_by else None
    failed = complete(trials, Path(__file__).with_name("train.py"), args.at_once, halved)
    if failed:
        raise WorkFailed(f"rows that failed: {', '.join(failed)}; what they said stands above")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
