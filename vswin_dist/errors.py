"""Every error that a user can meet, and how a command turns one into a line and an exit code.

Exit codes of every command and job: 0 done, 1 the work failed, 2 bad input.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class VswinError(Exception):
    """Base of the errors meant for users: what is wrong, with the values, and what to do."""

    exit_code = 1


class BadInput(VswinError):
    """The request itself cannot be met; nothing was started."""

    exit_code = 2


class ConfigError(BadInput):
    """A setting, an argument or a model shape that cannot be."""


class DataError(BadInput):
    """Videos, shards or manifests that are absent, damaged or do not fit each other."""


class CheckpointError(BadInput):
    """A checkpoint that is absent, damaged or does not fit the model."""


class PreflightError(BadInput):
    """The work as described cannot run on what is there."""


class WorkFailed(VswinError):
    """The work was started and failed; the message says where it stopped."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the nearest known word: ``" Did you mean 'x'?"``, or ``""`` where none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def at_least(least: int, **values: int) -> None:
    """Refuse a command's ``--NAME`` options whose values are below `least`.

    Raises:
        ConfigError: names the first.
    """
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"--{name}={value}: must be {least} or more")


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's main function; a `VswinError` becomes one line on stderr and its exit code."""
    try:
        return main() or 0
    except VswinError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 130
