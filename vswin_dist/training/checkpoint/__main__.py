"""Show, check and export the checkpoints of a training: `python -m vswin_dist.training.checkpoint list|verify|export ROOT`.

ROOT is the folder of a run (`RUNS/NAME`), that of its checkpoints (`RUNS/NAME/0001`), or one checkpoint; a folder or a URL.
Exit code 1 where damage is found, 2 where ROOT or an option names nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch

from vswin_dist import storage
from vswin_dist.errors import CheckpointError, run_command
from vswin_dist.model_card import CARD
from vswin_dist.models.weights.layouts import EXPORTS, export_state
from vswin_dist.models.weights.portable import load_model
from vswin_dist.training.checkpoint.files import COMMIT, DAMAGED, MODEL, STEP, Position, fetched, read_position, verify
from vswin_dist.training.checkpoint.folder import Found, best, in_use, model_of

WHOLE, NOT_COMMITTED, APART = "whole", "not committed: being written, or cut off", "set apart as damaged"
COLUMNS = ("checkpoint", "step", "epoch", "GB", "top-1", "state", "notes")


@dataclass(frozen=True)
class Entry:
    """A folder of a checkpoint, and what is known of it."""

    url: str
    state: str  # what is wrong with it, or one of the words above
    position: Position | None
    bytes: int
    model: str | None  # registered, that points to it

    @property
    def is_damaged(self) -> bool:
        """True for damage that nobody has dealt with yet."""
        return self.state not in (WHOLE, NOT_COMMITTED, APART)


def folders(root: str) -> list[str]:
    """Find the folders of checkpoints below `root`, of every number of a run.

    Raises:
        CheckpointError: there are none.
    """
    root = storage.absolute(root)
    names = storage.list_names(root)
    if COMMIT in names or MODEL in names:
        return [root]
    below = [storage.join(root, name) for name in names if name.isdecimal()]
    found = [
        storage.join(place, name)
        for place, held in [(root, names), *((url, storage.list_names(url)) for url in below)]
        for name in sorted(held, key=lambda name: name.removeprefix(DAMAGED))
        if name.startswith((STEP, f"{DAMAGED}{STEP}"))
    ]
    if not found:
        raise CheckpointError(f"no checkpoints at {root}: give the folder of a run, or of its checkpoints")
    return found


def look(url: str, wholly: bool) -> Entry:
    """Look at the folder of a checkpoint; `wholly`: at every byte of it."""
    name, sizes = url.rsplit("/", 1)[-1], storage.list_sizes(url)
    position, state = None, WHOLE
    try:
        position = read_position(url)
        if wholly:
            with in_use(url):
                verify(url)
    except CheckpointError as error:
        state = str(error).removeprefix(f"{url}/").removeprefix(f"{url} is ")
    if name.startswith(DAMAGED):
        state = APART
    elif COMMIT not in sizes:
        state = NOT_COMMITTED
    return Entry(url, state, position, sum(sizes.values()), model_of(url))


def table(entries: Sequence[Entry]) -> str:
    """Lay out `entries` in columns."""
    whole = [Found(e.url, e.position) for e in entries if e.position and e.state == WHOLE]
    top = best(whole)
    rows = [COLUMNS]
    for e in entries:
        notes = ["best"] if top and e.url == top.url and "val/top1" in top.position.metrics else []
        notes += ["newest"] if whole and e.url == whole[-1].url else []
        notes += [f"registered as {e.model}"] if e.model else []
        p = e.position
        score = p.metrics.get("val/top1") if p else None
        known = (str(p.step), str(p.epoch)) if p else ("-", "-")
        top1 = "-" if score is None else f"{score:.2f}"
        name = "/".join(e.url.rsplit("/", 2)[-2:])
        rows.append((name, *known, f"{e.bytes / 1e9:.3f}", top1, e.state, ", ".join(notes)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def show(root: str, step: int | None, wholly: bool) -> int:
    """Print the table; returns the exit code."""
    entries = [look(url, wholly) for url in folders(root) if step is None or _step(url) == step]
    if not entries:
        raise CheckpointError(f"no checkpoint of step {step} at {root}: `list` shows those that are there")
    print(table(entries))
    return int(any(e.is_damaged for e in entries))


def export(root: str, step: str, layout: str, target: str) -> int:
    """Write the weights of a checkpoint to the safetensors file `target`; returns the exit code.

    Raises:
        CheckpointError: there is no such checkpoint. ConfigError: the layout cannot hold the model.
    """
    url = _chosen(root, step)
    target = storage.absolute(target)
    try:
        with in_use(url), fetched(url, MODEL, CARD) as [path, _]:
            model, _ = load_model(str(path.parent))
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    state = export_state(model, layout)
    storage.put_bytes(target, safetensors.torch.save(state, {"format": "pt"}))
    print(f"{target}: {len(state)} tensors of {url}, layout {layout}")
    return 0


def _chosen(root: str, step: str) -> str:
    found = [look(url, wholly=False) for url in folders(root)]
    if step.isdecimal():
        known = [(_step_of(e), e.url) for e in found if e.state != APART or len(found) == 1]
        named = [url for number, url in known if number == int(step)]
        if not named and (there := sorted({number for number, _ in known if number >= 0})):
            raise CheckpointError(f"no checkpoint {step} at {root}: there are those of step {', '.join(map(str, there))}")
    elif len(found) == 1:
        named = [found[0].url]
    else:
        whole = [Found(e.url, e.position) for e in found if e.position and e.state == WHOLE]
        top = best(whole) if step == "best" else whole[-1] if whole else None
        named = [top.url] if top else []
    if not named:
        raise CheckpointError(f"no checkpoint {step} at {root}: `list` shows those that are there")
    return named[-1]


def _step_of(entry: Entry) -> int:
    """Return what the checkpoint says, or else the name of its folder; -1: neither does."""
    return entry.position.step if entry.position else _step(entry.url)


def _step(url: str) -> int:
    digits = url.rsplit("/", 1)[-1].removeprefix(DAMAGED).removeprefix(STEP).partition("-")[0]
    return int(digits) if digits.isdecimal() else -1


def _step_or_word(text: str) -> str:
    if text not in ("best", "newest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor best nor newest")
    return text


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m vswin_dist.training.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)
    for name, what in (
        ("list", "steps, sizes, scores, and what the sizes of files tell of damage"),
        ("verify", "the same, and every byte is read"),
        ("export", "write the weights of one as a plain safetensors file"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("root", metavar="ROOT", help="folder or URL of a run, of its checkpoints, or of one")
        if name == "verify":
            command.add_argument("--step", type=int, help="this one alone")
        if name == "export":
            command.add_argument("out", metavar="FILE", help="path or URL to write")
            command.add_argument("--step", type=_step_or_word, default="best", help="a step, best (the default) or newest")
            command.add_argument("--layout", choices=EXPORTS, default="native", help="names of the tensors")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(arguments)
    if args.command == "export":
        return export(args.root, args.step, args.layout, args.out)
    return show(args.root, getattr(args, "step", None), wholly=args.command == "verify")


if __name__ == "__main__":
    sys.exit(run_command(main))
