"""Recipes from the command line: `python -m vswin_dist.config card`."""

import argparse
import sys

from vswin_dist.config.card import card, entries
from vswin_dist.errors import run_command


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m vswin_dist.config", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "print what was published for each recipe, what is expected, what was measured here, and what was not run"
    commands.add_parser("card", help=text, description=text)
    parser.parse_args()
    print(f"Scores are top-1 / top-5 in percent, at 4 clips x 3 crops where nothing else is said.\n\n{card(entries())}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
