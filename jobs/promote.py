"""Let a registered model's candidate be its champion where it is better: `python jobs/promote.py NAME --data URL`."""

import argparse
import math
import sys

from vswin_dist.errors import ConfigError, after_start, run_command
from vswin_dist.evaluation.options import add_options, read_options


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", metavar="NAME", help="the registered model, which has an alias candidate")
    data = (
        "URL of the shards that both are scored on; else by the evaluations of both that are logged, if any are of one set"
    )
    parser.add_argument("--data", default=None, help=data)
    parser.add_argument("--margin", type=float, default=0.0, metavar="POINTS", help="of top-1, that must be exceeded")
    parser.add_argument("--certain", action="store_true", help="by the whole 95%% interval of the difference")
    add_options(parser, "the candidate's")
    args = parser.parse_args()
    asked = read_options(args)
    if not math.isfinite(args.margin):
        raise ConfigError(f"--margin={args.margin}: must be a number of points")

    from vswin_dist.evaluation import promotion, subjects
    from vswin_dist.evaluation.compare import compare

    contest = promotion.find_contest(args.name, asked)
    decision, tags = contest.settled, dict[str, str]()
    if decision is None:
        assert contest.champion
        subjects.check_tracking(asked)
        sides = promotion.scored(contest, asked)
        with after_start("Compare evaluations of one set."):
            comparison = compare((contest.champion.uri, contest.candidate.uri), *sides)
        decision, texts = promotion.decide(comparison, sides, args.margin, args.certain), subjects.files(comparison)
        folder = subjects.write(comparison, None, asked.storage_root, texts)
        print(f"{comparison}\npage  {folder}/compare.html", flush=True)
        tags["promotion_run"] = subjects.log(comparison, asked, texts, "promotion", decision=contest.says(decision))
    promotion.enact(contest, decision, asked, **tags)
    print(contest.says(decision))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
