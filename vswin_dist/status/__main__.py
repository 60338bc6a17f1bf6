"""Show all trainings below storage roots, from storage and MLflow alone: `python -m vswin_dist.status [ROOT ...]`.

States: `training`; `hangs` (ranks are silent, and about to be ended); `waits` (a driver holds the run, and has no ranks:
they start, or there is no room for them); `stopped` (in order, or by a signal) and `failed` (or its driver died), from
which the same command goes on; `finished`; `unknown` (its records cannot be read).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from vswin_dist import local_files, storage
from vswin_dist.errors import run_command

if TYPE_CHECKING:
    from vswin_dist.status.trainings import Training

COLUMNS = ("training", "state", "step", "clips/s", "left", "ranks", "checkpoint", "corrupt", "skipped", "driver", "notes")


def main() -> int:
    """Print the table, or the same as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m vswin_dist.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "a data root, a folder of runs or a run's; a path or a URL (default: runs in the data root)"
    parser.add_argument("roots", metavar="ROOT", nargs="*", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    text = "the store, where it is another than the trainings knew; none: MLflow is not asked"
    parser.add_argument("--tracking-uri", help=text)
    parser.add_argument("--s3-endpoint", help="another than AWS, or AWS_ENDPOINT_URL_S3")
    args = parser.parse_args()
    storage.use_s3_endpoint(args.s3_endpoint)
    from vswin_dist.status.trainings import trainings

    roots = args.roots or [str(local_files.home() / "runs")]
    found, problems = trainings(roots, args.tracking_uri)
    if args.json:
        print(json.dumps({"trainings": [asdict(t) for t in found], "problems": problems}, indent=1))
        return 0
    print(table(found) if found else f"no trainings below {', '.join(roots)}")
    for text in problems:
        print(text)
    return 0


def table(found: Sequence[Training]) -> str:
    """Lay out `found` in columns."""
    rows = [COLUMNS, *(row(training) for training in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def row(t: Training) -> tuple[str, ...]:
    """Return the cells of one training."""
    return (
        t.name,
        t.state,
        f"{t.step}/{t.steps}" if t.steps else str(t.step),
        _known(t.clips_per_second, "{:.1f}"),
        "-" if t.seconds_left is None else duration(t.seconds_left),
        _known(t.ranks, "{}"),
        f"{t.checkpoint.step}, {duration(t.checkpoint.age_s)} ago" if t.checkpoint else "-",
        _known(t.bad_videos, "{}"),
        _known(t.skipped_steps, "{}"),
        t.driver or "-",
        "; ".join(t.notes),
    )


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def duration(seconds: float) -> str:
    """Say how long `seconds` are, in the two largest units."""
    for unit, below, length in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if seconds >= length:
            rest = int(seconds % length) // {"h": 3600, "min": 60, "s": 1}[below]
            return f"{int(seconds // length)} {unit} {rest} {below}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(run_command(main))
