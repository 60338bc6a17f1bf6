"""Whether the programs of this project take a command line: their real parsers parse it, and its settings are loaded."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from data_prep.cli import parser as data_prep_parser
from vswin_dist.config import load_settings
from vswin_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]


class Parsing(BaseException):
    """A program is about to parse its arguments; nothing of it runs."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: list[str]) -> None:
        super().__init__()
        self.parser, self.arguments = parser, arguments


def program(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of `python WORDS`, and the arguments that the program gives it."""

    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, arguments: list[str] | None = None, *_: object) -> object:
        if any(action.dest == "benchmark" for action in parser._actions):  # it only chooses the program with the options
            return parse_args(parser, arguments)
        raise Parsing(parser, list(sys.argv[1:] if arguments is None else arguments))

    module = words[0] == "-m"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", words[1:] if module else words)
        try:
            if module:
                runpy.run_module(words[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except Parsing as found:
            return found.parser, found.arguments
    raise AssertionError(f"{words} parses no arguments")


@cache
def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def refused(words: list[str]) -> Iterator[str]:
    """What is wrong with the command `words`."""
    if words[0] == "make":
        yield from (f"no target {w}" for w in words[1:] if "=" not in w and w not in targets())
        return
    if words[:3] == ["ray", "job", "submit"]:
        from ray.dashboard.modules.job.cli import submit

        known = {option for parameter in submit.params for option in parameter.opts}
        own, command = words[3 : words.index("--")], words[words.index("--") + 1 :]
        yield from (f"ray has no option {w}" for w in own if w.startswith("--") and w not in known)
        yield from refused(command)
        return
    if words[0] == "data-prep":
        parser, arguments = data_prep_parser(), words[1:]
    elif words[0] == "python":
        parser, arguments = program(words[1:])
    else:
        yield f"{words[0]} is not a program of this project"
        return
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit:
        yield "its parser refuses it"
        return
    if hasattr(parsed, "settings"):
        yield from refused_settings(getattr(parsed, "recipe", None) or "k400_swin_t", parsed.settings)


def refused_settings(recipe: str, given: list[str]) -> Iterator[str]:
    """What is wrong with `[ROWS:]key=value` settings of a recipe; its batch must divide over its ranks."""
    try:
        s = load_settings(recipe, ["data.train=any", *(re.sub(r"^[\w*]+:(?=\w+\.)", "", setting) for setting in given)])
    except ConfigError as error:
        yield str(error)
        return
    t = s.training
    if t.global_batch % (t.workers * t.micro_batch):
        yield f"{t.workers} ranks x micro-batch {t.micro_batch} do not divide the global batch of {t.global_batch}"
