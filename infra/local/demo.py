"""`make demo`: videos -> shards -> 2D weights -> inflated model -> training on Ray and DeepSpeed -> scores -> registry.

Every step is the command that a user would give. With `--data DIR` (one folder per class, or an index.csv with path
and label) the videos are the user's; otherwise they are rendered.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from infra.local import motions
from infra.local.cluster import RAY, Cluster, local_cluster, run_shown, run_together
from infra.local.stills import pretrain
from vswin_dist import local_files
from vswin_dist.config import load_settings
from vswin_dist.errors import DataError, WorkFailed, run_command
from vswin_dist.manifest import read_manifest
from vswin_dist.tracking.provenance import source_version
from vswin_dist.tracking.run import tracking_uri

TRAIN_VIDEOS, VAL_VIDEOS = 1200, 300
OWN_EPOCHS = 34  # of a user's videos, from which less is learned in a step; more where they are fewer than TRAIN_VIDEOS
RENDERERS = min(os.cpu_count() or 1, 8)  # processes
REPOSITORY = Path(__file__).parents[2]
VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".mpg", ".mpeg", ".m4v")


@dataclass
class Demo:
    """One run of the demonstration: its folder, its name, and the seconds that each step took."""

    folder: Path
    name: str
    seed: int
    times: dict[str, float] = field(default_factory=dict)

    def command(self, step: str, *command: str, env: dict[str, str] | None = None) -> str:
        """Run `command` with `env` added, its output shown and returned; counts its seconds under `step`.

        Raises:
            WorkFailed: it ended with another code than 0.
        """
        print(f"\n$ {shlex.join(command)}", flush=True)
        began = time.perf_counter()
        code, output = run_shown(command, REPOSITORY, {**os.environ, **(env or {})})
        self._done(step, began, code)
        return output

    def commands(self, step: str, *commands: Sequence[str]) -> list[str]:
        """As `command`, of several side by side."""
        print("\n" + "\n".join(f"$ {shlex.join(command)} &" for command in commands), flush=True)
        began = time.perf_counter()
        done = run_together(commands, REPOSITORY, os.environ)
        self._done(step, began, next((code for code, _ in done if code), 0))
        return [output for _, output in done]

    def _done(self, step: str, began: float, code: int) -> None:
        if code:
            raise WorkFailed(f"the step {step!r} ended with exit code {code}; its output stands above")
        self.times[step] = time.perf_counter() - began


def split_index(data: Path, folder: Path, seed: int) -> None:
    """Write train.csv, val.csv (a fifth of each class, at random) and classes.txt of a user's folder.

    Raises:
        DataError: nothing there, or fewer than two videos in a class.
    """
    if (data / "index.csv").is_file():
        with open(data / "index.csv", newline="") as file:
            rows = [(r["path"], r["label"]) for r in csv.DictReader(file)]
    elif data.is_dir():
        rows = [
            (str(p.relative_to(data)), p.parent.name) for p in sorted(data.glob("*/*")) if p.suffix.lower() in VIDEO_ENDINGS
        ]
    else:
        raise DataError(f"{data} is not a folder")
    classes = defaultdict(list)
    for path, label in rows:
        classes[label].append(path)
    if len(classes) < 2 or min(map(len, classes.values())) < 2:
        raise DataError(
            f"{data}: found {len(rows)} videos in {len(classes)} classes; at least two classes of two "
            "videos are needed, as DIR/CLASS/VIDEO or in DIR/index.csv with path and label"
        )
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "val": []}
    for label, paths in sorted(classes.items()):
        random.Random(f"{seed}/{label}").shuffle(paths)  # noqa: S311
        held_out = max(1, len(paths) // 5)
        parts["val"] += [(p, label) for p in paths[:held_out]]
        parts["train"] += [(p, label) for p in paths[held_out:]]
    for part, chosen in parts.items():
        with open(folder / f"{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *chosen])
    (folder / "classes.txt").write_text("".join(f"{c}\n" for c in sorted(classes)))


def shard_command(demo: Demo, part: str, data: Path | None) -> list[str]:
    """Return the command that makes the shards of `part`, train or val."""
    videos = demo.folder / "videos" / part if data is None else data
    index = videos / "index.csv" if data is None else demo.folder / f"{part}.csv"
    columns = ("--path-column", "path", "--label-column", "label", "--classes", str(demo.folder / "classes.txt"))
    made = ("--name", demo.name, "--split", part, "--out", str(demo.folder / "shards" / part))
    side = "48" if data is None else "128"
    tool = str(Path(sys.executable).with_name("data-prep"))
    return [tool, "shard", "csv", "--index", str(index), "--videos", str(videos), *columns, "--short-side", side, *made]


def prepare(demo: Demo, data: Path | None) -> dict[str, int] | None:
    """Make the shards of both sets; returns what still frames are to teach (None: the classes)."""
    shutil.rmtree(demo.folder / "shards", ignore_errors=True)
    labels = None
    if data is None:
        began = time.perf_counter()
        for part, count, offset in (("train", TRAIN_VIDEOS, 0), ("val", VAL_VIDEOS, 1)):
            motions.make_dataset(demo.folder / "videos" / part, count, 2 * demo.seed + offset, RENDERERS)
        (demo.folder / "classes.txt").write_text("".join(f"{m}\n" for m in motions.MOTIONS))
        with open(demo.folder / "videos" / "train" / "index.csv", newline="") as file:
            labels = {r["path"]: motions.SHAPES.index(r["shape"]) for r in csv.DictReader(file)}
        demo.times["render"] = time.perf_counter() - began
    else:
        split_index(data, demo.folder, demo.seed)
    demo.commands("shard", *(shard_command(demo, part, data) for part in ("train", "val")))
    return labels


def lengthened(clips: int) -> list[str]:
    """Return the settings that train on a user's set of so many clips, in as many steps at least as one of TRAIN_VIDEOS."""
    epochs = round(OWN_EPOCHS * max(TRAIN_VIDEOS / clips, 1))
    batch = load_settings("demo", ["data.train=any"]).training.global_batch
    return [
        f"training.epochs={epochs}",
        f"optim.warmup_epochs={epochs / 8:g}",
        f"evaluation.every_epochs={epochs // 7}",
        f"training.checkpoint_every={TRAIN_VIDEOS // batch}",
    ]


def submit(demo: Demo, cluster: Cluster, overrides: list[str]) -> str:
    """Train through the real `ray job submit`; returns its output."""
    variables = {"VSWIN_HOME": str(local_files.home()), "VSWIN_SOURCE_COMMIT": source_version(REPOSITORY)}
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        variables["MLFLOW_TRACKING_URI"] = uri
    return demo.command(
        "train",
        RAY,
        "job",
        "submit",
        "--address",
        cluster.dashboard,
        "--working-dir",
        ".",
        "--runtime-env-json",
        json.dumps({"env_vars": variables}),
        "--",
        "python",
        "jobs/train.py",
        "--recipe",
        "demo",
        *overrides,
        env=cluster.env,
    )


def run(seed: int, data: Path | None, extra: list[str]) -> int:
    """Run the whole line, ending with a table."""
    began = time.perf_counter()
    name = "demo" if data is None else f"demo-{re.sub('[^A-Za-z0-9_-]+', '-', data.name)}"
    demo = Demo(local_files.home() / "demo" / name, name, seed)
    demo.folder.mkdir(parents=True, exist_ok=True)
    labels = prepare(demo, data)
    sets = [f"data.{part}={demo.folder / 'shards' / part}" for part in ("train", "val")]
    clips = len(read_manifest(sets[0].partition("=")[2]).samples)
    longer = lengthened(clips) if data else []
    overrides = [f"run.name={name}", "run.fresh=true", f"run.seed={seed}", *sets, *longer, *extra]
    settings = load_settings("demo", overrides)

    print("\ntraining a small 2D Swin on still frames", flush=True)
    started = time.perf_counter()
    weights = demo.folder / "swin_nano_2d.pth"
    stills = pretrain(settings, labels, 5 * max(1, min(TRAIN_VIDEOS // clips, 4)), weights)
    demo.times["2D weights"] = time.perf_counter() - started
    job = (sys.executable, "jobs/inflate.py", "--weights", str(weights), "--recipe", "demo")
    inflated = demo.command("inflate", *job, "--register", f"{name}-inflated", *overrides)
    with local_cluster(cpus=2) as cluster:
        trained = submit(demo, cluster, [*overrides, f"model.init=models:/{name}-inflated@champion"])
    model = re.findall(r"model +(models:\S+)", trained)[-1]  # the champion, or of a later demo its candidate
    one_view = ("--model", model, "--clips", "1", "--crops", "1")
    score = (sys.executable, "jobs/evaluate.py", *one_view, "--data", sets[1].partition("=")[2], "--batch", "32")
    video = next(iter((demo.folder / "videos" / "val").glob("*/*"))) if data is None else data / first_path(demo.folder)
    predict = (sys.executable, "jobs/predict.py", *one_view, str(video))
    ordered, shuffled, _ = demo.commands("evaluate and predict", score, (*score, "--shuffle-frames"), predict)
    speed = re.findall(r"([\d.]+) clips/s", trained)
    rows = [
        ("2D weights", f"{stills:.1f}% of still frames in the last epoch"),
        ("inflated model", re.findall(r"registered (\S+)", inflated)[-1]),
        ("trained model", model),
        *(("report", page) for page in re.findall(r"^report +(\S+)$", trained, re.MULTILINE)[-1:]),
        ("top-1, validation", f"{last_top1(ordered)}%"),
        ("top-1, frames in random order", f"{last_top1(shuffled)}%"),
        ("clips/s in training (median)", f"{sorted(map(float, speed))[len(speed) // 2]:.0f}"),
        *((f"seconds: {step}", f"{seconds:.0f}") for step, seconds in demo.times.items()),
        ("seconds in all", f"{time.perf_counter() - began:.0f}"),
    ]
    print("\n" + "\n".join(f"{key:32} {value}" for key, value in rows))
    print(
        f"\nCompare the runs:  {Path(sys.executable).with_name('mlflow')} ui "
        f"--backend-store-uri {tracking_uri(None)} --port 5000\n"
        "                   and at the top left of http://127.0.0.1:5000 choose Model training"
    )
    return 0


def last_top1(text: str) -> str:
    """Return the top-1 that a job printed last, in percent."""
    return str(re.findall(r"top-1 ([\d.]+)%", text)[-1])


def first_path(folder: Path) -> str:
    """Return the first video of the validation index in `folder`."""
    with open(folder / "val.csv", newline="") as file:
        return str(next(csv.DictReader(file))["path"])


def _stop(number: int, _: FrameType | None) -> None:
    """Unwind, so that everything started is ended; a second signal, which make sends on, must not cut that short."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None, help="a folder with one folder per class, or an index.csv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    return run(args.seed, args.data.absolute() if args.data else None, args.settings)


if __name__ == "__main__":
    sys.exit(run_command(main))
