"""What a training run is, told to its tracking store before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from vswin_dist.config import defaults, to_flat
from vswin_dist.tracking import DatasetRecord, Run, below
from vswin_dist.training.optim import groups_table
from vswin_dist.training.spec import TrainingSpec

# Settings that trainings are most often compared by: params also where they have their defaults, else a table shows a gap.
COMPARED = ("run.seed", "model.drop_path_rate", "training.epochs", "training.global_batch", "optim.lr", "optim.weight_decay")


def log_start(tracking: Run, recipe_text: str, spec: TrainingSpec, lineage: Mapping[str, Any]) -> None:
    """Log everything that is known before the first step."""
    s, train, val = spec.settings, spec.train, spec.val
    datasets = [DatasetRecord(train.name, train.fingerprint, s.data.train, "training", train.counts)]
    if val and s.data.val:
        datasets.append(DatasetRecord(val.name, val.fingerprint, s.data.val, "validation", val.counts))
    complete = yaml.safe_dump(to_flat(s), sort_keys=False)
    files = {"parameter_groups.md": groups_table(spec.groups, s.optim.lr), "settings.yaml": complete}
    if spec.load_report:
        files["load_report.txt"] = spec.load_report
    tracking.start(
        settings={"recipe": s.recipe, **to_flat(s)},
        defaults={name: value for name, value in defaults().items() if name not in COMPARED},
        recipe=recipe_text,
        source=str(lineage["source_commit"]),
        world_size=max(spec.world_sizes),
        datasets=datasets,
        files=files,
        tags={"kind": "training", "recipe": s.recipe, "variant": s.model.name, **below(s.tracking.parent)},
    )
