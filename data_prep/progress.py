"""Progress on stderr by tqdm: a bar on a terminal, else a plain line now and then, so that a log does not fill up."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

TERMINAL_S = 0.5
PLAIN_S = 10.0
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{remaining} left, {rate_noinv_fmt}{postfix}]"
PLAIN = "{n_fmt}/{total_fmt}{unit} {percentage:.1f}%, {rate_noinv_fmt}, {remaining} left{postfix}"


class _Lines:
    """Stderr without the carriage returns by which tqdm redraws its bar."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def say(notes: Sequence[str], most: int = 20) -> None:
    """Print what people should know, a line each, `most` of them at most; report.json holds them all."""
    for note in notes[:most]:
        print(f"note: {note}", file=sys.stderr, flush=True)
    if len(notes) > most:
        print(f"... and {len(notes) - most:,} more notes, all of them in report.json", file=sys.stderr, flush=True)


class Progress:
    """Counts towards `total` of `unit`, `done` of which an earlier run has finished; silent where not `shown`."""

    def __init__(self, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        terminal = sys.stderr.isatty()
        self._unit = unit
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=f" {unit}",
            disable=not shown,
            leave=False,
            file=sys.stderr if terminal else _Lines(),
            miniters=1,
            mininterval=TERMINAL_S if terminal else PLAIN_S,
            delay=0 if terminal else PLAIN_S,
            dynamic_ncols=terminal,
            bar_format=BAR if terminal else PLAIN,
        )

    def advance(self, note: str = "") -> None:
        """Count one more; `note` stands at the end of the line."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()

    def close(self, note: str = "") -> None:
        """Replace the bar by the last line: how many in what time."""
        if self._bar.disable:
            return
        seconds = self._bar.format_dict["elapsed"]
        rate = (self._bar.n - self._bar.initial) / max(seconds, 1e-9)
        self._bar.close()
        line = f"{self._bar.n:,} {self._unit} in {tqdm.format_interval(seconds)}, {rate:.1f}/s{note}"
        print(line, file=sys.stderr, flush=True)
