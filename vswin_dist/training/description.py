"""What people read of a registered model: what it was made of and by, how good it is, and where it ends. Markdown."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from vswin_dist.config import Settings
from vswin_dist.manifest import Manifest
from vswin_dist.tracking import redact
from vswin_dist.training.spec import TrainingSpec

SCORES = {"val/top1": "top-1", "val/top5": "top-5", "val/mean_class_accuracy": "mean class"}
MAX_COMMAND = 1500  # characters


def describe_trained(spec: TrainingSpec, lineage: Mapping[str, Any], step: int, metrics: Mapping[str, float]) -> str:
    """Describe the checkpoint of `step`; `metrics` are those of its validation."""
    s, classes = spec.settings, len(spec.train.classes)
    d, size = s.data, f"{s.data.size} x {s.data.size}"
    rows = {
        "recipe": s.recipe or "-",
        "network": f"{s.model.name}, {spec.parameters:,} parameters",
        "data": _data(spec.train),
        "validated on": _data(spec.val) if spec.val else "nothing",
        "clips": f"{d.frames} frames of {size}, {d.sampling}" + (f", stride {d.stride}" if d.sampling == "dense" else ""),
        "started from": s.model.init or lineage.get("initialised_from") or "random weights",
        "step": f"{step:,}" + (", averaged weights" if s.evaluation.ema else ""),
        "training run": lineage.get("training_run") or "-",
        "commit": lineage.get("source_commit") or "-",
    }
    known = [f"{name} {metrics[key]:.2f}" for key, name in SCORES.items() if key in metrics]
    scores = "It was not scored: the training had no validation set."
    if known:
        scores = (
            f"{', '.join(known)} in the training's own validation, at {s.evaluation.clips} x {s.evaluation.crops} views. It "
            "chose the checkpoint, so that this is a little flattering; `jobs/evaluate.py` adds scores with their intervals."
        )
    limits = (
        f"It gives every video one of its {classes} classes, also one that shows none of them. What the scores say holds "
        "for videos like those they were measured on."
    )
    return _text("A Video Swin Transformer for classifying videos.", rows, {"In training": scores, "Limits": limits})


def describe_inflated(s: Settings, source: str, commit: str) -> str:
    """Describe 2D weights that were inflated for the model of the recipe `s`."""
    rows = {"recipe": s.recipe or "-", "network": s.model.name, "started from": source, "commit": commit}
    limits = "Its head is random and names no classes, and nothing says how clips are cut: it cannot be scored or predict."
    return _text("2D Swin weights inflated over time, for a training to start from.", rows, {"Limits": limits})


def _data(manifest: Manifest) -> str:
    videos, classes = len(manifest.samples), len(manifest.classes)
    return f"{manifest.name} {manifest.split}: {videos:,} videos of {classes} classes, `{manifest.fingerprint}`"


def _text(head: str, rows: Mapping[str, str], parts: Mapping[str, str]) -> str:
    command = shlex.join(["python", *sys.argv])
    if len(command) > MAX_COMMAND:
        command = f"{command[:MAX_COMMAND]}…"
    lines = [head, "", "| | |", "|---|---|", *(f"| {k} | {v.replace('|', '/')} |" for k, v in rows.items())]
    for title, text in parts.items():
        lines += ["", f"## {title}", "", text]
    return redact("\n".join([*lines, "", "## Made by", "", "```sh", command, "```", ""]))
