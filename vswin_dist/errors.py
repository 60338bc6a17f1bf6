"""Every error that a user can meet, and how a command turns one into a line and an exit code.

Exit codes of every command and job: 0 done, 1 the work failed, 2 bad input. 2 only before the start: nothing was begun,
so that nothing is lost and nothing is to be resumed. What fails later is 1, whatever it is. `before_start` and
`after_start` draw this line where a command does: the same storage is read before it and after it.
"""

from __future__ import annotations

import difflib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


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


class FencedOut(WorkFailed):
    """Another process has taken over what this one was doing; nothing more of this one counts."""


class Replaced(WorkFailed):
    """Another start of the same ranks goes on with their work: no failure of the training."""


class RanksFailed(WorkFailed):
    """Ranks failed more often than is allowed, or the cluster under them is gone."""


class StorageError(WorkFailed):
    """Storage that fails or refuses access. What it holds may be sound: damage is a `DataError`.

    Args:
        retriable: another attempt may succeed, later if not now; False where access is refused or a disk is full.
        errno: of the operating system, where it was its error.
    """

    def __init__(self, message: str, retriable: bool = True, errno: int | None = None) -> None:
        super().__init__(message)
        self.retriable, self.errno = retriable, errno


class TrackingError(WorkFailed):
    """A tracking store that is away or refuses.

    Args:
        retriable: it is away, and may take the same request later; False where it refuses.
    """

    def __init__(self, message: str, retriable: bool = True) -> None:
        super().__init__(message)
        self.retriable = retriable


@contextmanager
def before_start() -> Iterator[None]:
    """Refuse to start where storage or the tracking store fails: nothing was started.

    Raises:
        PreflightError: for a `StorageError` or `TrackingError` of the block, with its message.
    """
    try:
        yield
    except (StorageError, TrackingError) as error:
        raise PreflightError(str(error)) from error


@contextmanager
def after_start(resume: str) -> Iterator[None]:
    """Say how to resume what was started, `resume` being the sentence for it, at the end of the message.

    Raises:
        WorkFailed: that of the block, or for its `BadInput`: begun work is no longer a request that can be refused.
    """
    try:
        yield
    except BadInput as error:
        raise WorkFailed(_ending_in(resume, error)) from error
    except (StorageError, TrackingError, RanksFailed) as error:
        error.args = (_ending_in(resume, error),)
        raise


def _ending_in(sentence: str, error: VswinError) -> str:
    text = str(error)
    return text if text.endswith(sentence) else f"{text.rstrip('.')}. {sentence}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Name the nearest known word: `" Did you mean 'x'?"`, or `""` where none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def at_least(least: int, **values: int) -> None:
    """Refuse a command's `--NAME` options whose values are below `least`.

    Raises:
        ConfigError: names the first.
    """
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"--{name}={value}: must be {least} or more")


def heed_interrupts() -> None:
    """Let SIGINT interrupt this process, where a shell had it ignored, as it does for what it starts in the background.

    To be called, in the main thread, before something that stops the work by that signal.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
