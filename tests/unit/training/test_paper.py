"""Which trainings an ablation means, and what it makes of those that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import save
from vswin_dist.config import to_flat
from vswin_dist.errors import ConfigError
from vswin_dist.manifest import read_manifest
from vswin_dist.model_card import ModelCard, preprocessing_of
from vswin_dist.tracking import backend
from vswin_dist.training import checkpoint, paper, run_record


def test_rows_are_named_and_take_overrides_of_all_or_of_some() -> None:
    trials = paper.plan(
        7, [], "mine", ["data.train=/x", "training.workers=4", "1k_*:model.init=A", "22k_*:model.init=s3://b/B"]
    )
    assert [t.settings.run.name for t in trials] == [
        "mine_table7_1k_ratio01",
        "mine_table7_1k_ratio1",
        "mine_table7_22k_ratio01",
        "mine_table7_22k_ratio1",
    ]
    assert [t.settings.model.init for t in trials] == ["A", "A", "s3://b/B", "s3://b/B"]
    assert [t.settings.optim.backbone_ratio for t in trials] == [0.1, 1.0, 0.1, 1.0]
    assert {t.settings.training.workers for t in trials} == {4}
    assert [t.label for t in paper.plan(6, ["none"], "mine", ["data.train=/x"])] == ["none"]


@pytest.mark.parametrize(
    ("table", "labels", "override", "message"),
    [
        (3, [], "run.seed=1", "table 3: the paper's ablations are tables 4 to 9"),
        (4, ["spilt"], "run.seed=1", "Did you mean 'split'?"),
        (4, [], "run.name=x", "use --name"),
        (4, [], "joint:run.name=x", "use --name"),
        (4, [], "22k_*:model.init=A", "no row matches '22k_*'"),
        (4, [], "model.inti=A", "Did you mean 'model.init'?"),
    ],
)
def test_what_cannot_be_is_refused(table: int, labels: list[str], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        paper.plan(table, labels, "mine", ["data.train=/x", override])
    assert message in str(error.value)


def test_a_table_of_your_own_has_a_base_and_a_row_for_each_label() -> None:
    given = ["data.train=/x", "low:optim.lr=1e-4", "high:optim.lr=1e-2", "*:training.epochs=5"]
    trials = paper.plan_own("demo", [], "mine", given)
    assert [(t.label, t.settings.run.name) for t in trials] == [(n, f"mine_{n}") for n in ("base", "low", "high")]
    assert [t.settings.optim.lr for t in trials] == [1e-3, 1e-4, 1e-2]
    assert {t.settings.training.epochs for t in trials} == {5}
    assert [t.changes for t in trials] == [f"{own}training.epochs=5" for own in ("", "optim.lr=1e-4, ", "optim.lr=1e-2, ")]
    assert [t.label for t in paper.plan_own("demo", ["high"], "mine", given)] == ["high"]
    lines = paper.comparison(trials[1:], classes=6).splitlines()
    assert lines[0] == "| training | top-1 / top-5 | settings | MACs, G | parameters, M |"
    assert lines[2] == "| mine_low | - | optim.lr=1e-4, training.epochs=5 | 0.0523 | 1.3 |" and "published" not in lines[-1]


@pytest.mark.parametrize(
    ("labels", "override", "message"),
    [
        ([], "run.seed=1", "no row is named; give what each changes"),
        (["hihg"], "high:optim.lr=1", "Did you mean 'high'?"),
        ([], "high:run.name=x", "use --name"),
        ([], "high:optim.rl=1", "Did you mean 'optim.lr'?"),
        ([], "a/b:optim.lr=1", "run.name"),
    ],
)
def test_what_cannot_be_a_table_of_your_own_is_refused(labels: list[str], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        paper.plan_own("demo", labels, "mine", ["data.train=/x", override])
    assert message in str(error.value)


@pytest.mark.slow
def test_the_rows_have_one_parent_however_often_the_command_is_given(motion_shards: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    given = [f"data.train={motion_shards}/train", f"storage.root={tmp_path}", f"tracking.uri={uri}", "low:optim.lr=1e-4"]
    trials = paper.plan_own("demo", [], "mine", given)
    with pytest.raises(KeyboardInterrupt), paper.parent(trials) as (first, earlier):
        assert earlier == 0
        paper.log(first, earlier, trials, "| begun |")
        raise KeyboardInterrupt
    assert backend.client(uri).get_run(first.id).info.status == "KILLED"
    for top1 in (20.0, 61.3):  # the second command goes on with the row
        finish(trials[1], top1)
        with paper.parent(trials) as (again, earlier):
            paper.log(again, earlier, trials, "| table |")
    run = backend.client(uri).get_run(again.id)
    assert again.id == first.id and run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.tags["kind"] == "ablation" and run.data.metrics == {"low/top1": 61.3, "low/top5": 98.8}
    assert Path(run.info.artifact_uri, "comparison.md").read_text() == "| table |"


def finish(trial: paper.Trial, top1: float) -> None:
    """Leave what a finished training of `trial` leaves."""
    s, fingerprint = trial.settings, read_manifest(trial.settings.data.train).fingerprint
    run_record.write(trial.root, run_record.RunRecord("run1", fingerprint, to_flat(s), finished=True, step=3))
    position = checkpoint.Position(3, 1, 0, "run1", fingerprint, to_flat(s), [], {}, {"val/top1": top1, "val/top5": 98.8})
    weights = {"w": torch.zeros(1)}
    save(f"{trial.root}/run1", position, weights, weights, ModelCard({}, ["a"], preprocessing_of(s.data), {}))


def test_finished_rows_are_known_and_stand_beside_the_published(motion_shards: Path, tmp_path: Path) -> None:
    overrides = [
        f"data.train={motion_shards}/train",
        f"storage.root={tmp_path}",
        "model.name=swin_nano",
        "data.frames=16",
        "data.size=32",
    ]
    first, second, third = paper.plan(6, [], "mine", overrides)
    assert not first.is_finished() and first.scores() is None
    finish(first, 61.3)
    asked = replace(first, settings=replace(first.settings, data=replace(first.settings.data, sampling=None)))
    assert asked.is_finished(), "the rule of the manifest is the one that it was trained by"
    assert first.is_finished() and not second.is_finished() and not third.is_finished()
    lines = paper.comparison([first, second], classes=6).splitlines()
    assert lines[2] == "| mine_table6_3d | 61.3 / 98.8 | 78.8 / 93.6 | 0.112 | - | 1.3 | - |"
    assert lines[3].startswith("| mine_table6_spatial | - | 78.5 / 93.5 | ")
    assert "1 x 1 views" in lines[-1]

    longer = replace(first, settings=replace(first.settings, training=replace(first.settings.training, max_steps=9)))
    afresh = replace(first, settings=replace(first.settings, run=replace(first.settings.run, fresh=True)))
    assert not longer.is_finished() and not afresh.is_finished()
    patient = replace(longer.settings.evaluation, patience=2)
    scored = replace(longer.settings.data, val=f"{motion_shards}/val")
    stalled = replace(longer, settings=replace(longer.settings, data=scored, evaluation=patient))
    for evaluations, ended in ((1, False), (2, True)):
        run_record.write(first.root, replace(run_record.read(first.root), stalled=evaluations))  # type: ignore[type-var]
        assert stalled.is_finished() is ended
    other = replace(first, settings=replace(first.settings, optim=replace(first.settings.optim, lr=0.5)))
    with pytest.raises(ConfigError, match=r"begun with other settings \(optim.lr: 0.001 -> 0.5\)"):
        other.is_finished()
