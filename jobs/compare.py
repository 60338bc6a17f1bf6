"""Compare two models on the same videos: `python jobs/compare.py models:/NAME/3 models:/NAME@champion --data URL`."""

import argparse
import sys

from vswin_dist.errors import after_start, run_command
from vswin_dist.evaluation.options import add_options, read_options


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    side = "models:/NAME@alias, models:/NAME/3, a checkpoint's folder or URL, or a file predictions.parquet of an evaluation"
    parser.add_argument("a", metavar="A", help=side)
    parser.add_argument("b", metavar="B", help="likewise; what is said is said of B against A")
    parser.add_argument("--data", default=None, help="URL of the shards that models are scored on, or were")
    parser.add_argument("--any-data", action="store_true", help="compare what was scored on different sets, by common keys")
    parser.add_argument("--out", default=None, metavar="URL", help="folder of the page and the tables")
    add_options(parser, "each model's")
    args = parser.parse_args()
    asked = read_options(args)

    from vswin_dist.evaluation import subjects
    from vswin_dist.evaluation.compare import check_comparable, compare

    a, b = (subjects.find_subject(reference, asked) for reference in (args.a, args.b))
    check_comparable(a.identity, b.identity, args.any_data)
    subjects.check_tracking(asked)
    found = (a.predictions(asked), b.predictions(asked))
    with after_start("Compare evaluations of one set."):
        comparison = compare((a.name, b.name), *found, any_data=args.any_data)
    texts = subjects.files(comparison)
    folder = subjects.write(comparison, args.out, asked.storage_root, texts)
    print(f"{comparison}\npage  {folder}/compare.html", flush=True)  # whatever becomes of its run in the tracking store
    subjects.log(comparison, asked, texts)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
