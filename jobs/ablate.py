"""Train the rows of one of the paper's ablations on your data: ``python jobs/ablate.py --table 4 key=value ...``.

Rows that are finished are not trained again, and one that was cut off goes on, so the same command completes a table.
"""

import argparse
import sys

from vswin_dist.config import recipe_text
from vswin_dist.errors import ConfigError, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=int, required=True, help="4 to 9")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="train these alone")
    parser.add_argument("--name", default="ablation", help="the trainings are called NAME_tableN_ROW (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the rows, and the scores there are, and stop")
    parser.add_argument("settings", nargs="*", metavar="[ROWS:]key=value",
                        help="settings that replace the recipes', of all rows or of some, as in 22k_*:model.init=FILE")
    args = parser.parse_args()

    from vswin_dist.manifest import read_manifest
    from vswin_dist.planning.preflight import preflight
    from vswin_dist.training import ablation
    from vswin_dist.training.launch import train

    nowhere = ["data.train=unused"] if args.list else []
    trials = ablation.plan(args.table, args.rows, args.name, [*nowhere, *args.settings])
    if args.list:
        print(ablation.comparison(trials))
        return 0
    if not all(t.settings.data.val for t in trials):
        raise ConfigError("data.val is not set: an ablation compares scores of a validation set")
    waiting = [(t, preflight(t.settings)) for t in trials if not t.is_finished()]  # all are checked before one is trained
    for trial, prepared in waiting:
        print(prepared.summary(), flush=True)
        train(recipe_text(trial.row.recipe), prepared)
    data = read_manifest(trials[0].settings.data.train)
    text = ablation.comparison(trials, len(data.classes))
    ablation.log(trials, text, data)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
