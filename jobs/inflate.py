"""Register a 2D Swin checkpoint as an inflated video model, for the model of a recipe.

``python jobs/inflate.py --weights FILE --recipe NAME --register NAME``
"""

import argparse
import sys

from vswin_dist.config import load_settings
from vswin_dist.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="2D Swin checkpoint: a file or URL")
    parser.add_argument("--recipe", required=True, help="the recipe whose model is to start from it")
    parser.add_argument("--register", required=True, help="name of the registered model")
    parser.add_argument("--alias", default="champion")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    args = parser.parse_args()
    settings = load_settings(args.recipe, [*args.settings, "data.train=unused"])

    from vswin_dist.training.start import register_inflated

    version, report = register_inflated(args.weights, settings, args.register, args.alias)
    print(report)
    print(f"registered models:/{args.register}/{version} (alias {args.alias})")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
