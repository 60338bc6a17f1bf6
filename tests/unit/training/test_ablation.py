"""Which trainings an ablation means, and what it makes of those that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vswin_dist.config import to_flat
from vswin_dist.errors import ConfigError
from vswin_dist.manifest import read_manifest
from vswin_dist.serving.export import ModelCard, preprocessing_of
from vswin_dist.training import ablation, checkpoint, identity


def test_rows_are_named_and_take_overrides_of_all_or_of_some() -> None:
    trials = ablation.plan(7, [], "mine", ["data.train=/x", "training.workers=4", "1k_*:model.init=A", "22k_*:model.init=s3://b/B"])
    assert [t.settings.run.name for t in trials] == [
        "mine_table7_1k_ratio01", "mine_table7_1k_ratio1", "mine_table7_22k_ratio01", "mine_table7_22k_ratio1"]
    assert [t.settings.model.init for t in trials] == ["A", "A", "s3://b/B", "s3://b/B"]
    assert [t.settings.optim.backbone_ratio for t in trials] == [0.1, 1.0, 0.1, 1.0]
    assert {t.settings.training.workers for t in trials} == {4}
    assert [t.row.label for t in ablation.plan(6, ["none"], "mine", ["data.train=/x"])] == ["none"]


@pytest.mark.parametrize(("table", "labels", "override", "message"), [
    (3, [], "run.seed=1", "table 3: the paper's ablations are tables 4 to 9"),
    (4, ["spilt"], "run.seed=1", "Did you mean 'split'?"),
    (4, [], "run.name=x", "use --name"),
    (4, [], "joint:run.name=x", "use --name"),
    (4, [], "22k_*:model.init=A", "no row matches '22k_*'"),
    (4, [], "model.inti=A", "Did you mean 'model.init'?"),
])
def test_what_cannot_be_is_refused(table: int, labels: list[str], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ablation.plan(table, labels, "mine", ["data.train=/x", override])
    assert message in str(error.value)


def finish(trial: ablation.Trial, top1: float) -> None:
    """Leave what a finished training of `trial` leaves."""
    s, fingerprint = trial.settings, read_manifest(trial.settings.data.train).fingerprint
    identity.write_identity(trial.root, identity.Identity("run1", fingerprint, to_flat(s), finished=True, step=3))
    position = checkpoint.Position(3, 1, 0, "run1", fingerprint, to_flat(s), [], {}, {"val/top1": top1, "val/top5": 98.8})
    weights = {"w": torch.zeros(1)}
    checkpoint.save(f"{trial.root}/run1", position, weights, weights, ModelCard({}, ["a"], preprocessing_of(s.data), {}))


def test_finished_rows_are_known_and_stand_beside_the_published(motion_shards: Path, tmp_path: Path) -> None:
    overrides = [f"data.train={motion_shards}/train", f"storage.root={tmp_path}", "model.name=swin_nano", "data.frames=16",
                 "data.size=32"]
    first, second, third = ablation.plan(6, [], "mine", overrides)
    assert not first.is_finished() and first.scores() is None
    finish(first, 61.3)
    assert first.is_finished() and not second.is_finished() and not third.is_finished()
    lines = ablation.comparison([first, second], classes=6).splitlines()
    assert lines[2] == "| mine_table6_3d | 61.3 / 98.8 | 78.8 / 93.6 | 0.112 | - | 1.3 | - |"
    assert lines[3].startswith("| mine_table6_spatial | - | 78.5 / 93.5 | ")
    assert "1 x 1 views" in lines[-1]

    longer = replace(first, settings=replace(first.settings, training=replace(first.settings.training, max_steps=9)))
    afresh = replace(first, settings=replace(first.settings, run=replace(first.settings.run, fresh=True)))
    assert not longer.is_finished() and not afresh.is_finished()
    other = replace(first, settings=replace(first.settings, optim=replace(first.settings.optim, lr=0.5)))
    with pytest.raises(ConfigError, match=r"begun with other settings \(optim.lr: 0.001 -> 0.5\)"):
        other.is_finished()
