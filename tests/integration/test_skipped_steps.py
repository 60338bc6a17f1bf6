"""A step that is not finite is left out on all ranks, and nothing else of the training is changed by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import net, trainers
from tests.support.line import Line
from tests.support.net import OPTIM
from tests.support.ranks import run_ranks
from vswin_dist.config.schema import TrainingSettings
from vswin_dist.data.transforms.batch_transform import BatchTransform
from vswin_dist.manifest import read_manifest
from vswin_dist.training import checkpoint
from vswin_dist.training.trainer import WorkerConfig

SKIPPING = replace(OPTIM, max_skipped_steps=2)
BAD, STEPS = (0, 3), 6  # the first step too: AdamW has no moments yet


def skipping(precision: str) -> dict[int, Any]:
    """Of each stage: a whole training, and one in two parts."""
    found = {}
    for stage in range(4):
        training = TrainingSettings(zero_stage=stage, precision=precision)
        whole = net.train(training, SKIPPING, 0, STEPS, bad=BAD)
        first = net.train(training, SKIPPING, 0, 1, bad=BAD)
        second = net.train(training, SKIPPING, 1, STEPS, first.state, bad=BAD)
        parts = first.losses + second.losses
        same = {n: torch.equal(t, whole.state["weights"][n]) for n, t in second.state["weights"].items()}
        found[stage] = (whole.applied, whole.losses, whole.norms, parts, same, whole.state["weights"])
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_a_skipped_step_changes_nothing_else(precision: str, tolerance: float) -> None:
    losses, weights = net.plain(OPTIM, STEPS, BAD)
    for ranks in run_ranks(2, skipping, precision):
        for stage, (applied, found, norms, parts, same, end) in ranks.items():
            assert applied == [step not in BAD for step in range(STEPS)], stage
            assert [math.isfinite(n) and n > 0 for n in norms] == applied, stage
            assert found == pytest.approx(losses, abs=tolerance, nan_ok=True), stage
            assert parts == pytest.approx(found, abs=0, nan_ok=True), stage
            assert all(same.values()), stage
            assert all(torch.allclose(end[n], weights[n], atol=tolerance) for n in weights), stage


def infinite_loss() -> list[bool]:
    """A loss that overflows, of which each gradient is finite: whether the step was taken, by stage."""
    found = []
    for stage in range(4):
        engine = net.train(TrainingSettings(zero_stage=stage, precision="fp32"), SKIPPING, 0, 1).engine
        for _ in range(2):
            x, _ = net.batch(0)
            logits = engine.forward(x[:2], torch.zeros(2, dtype=torch.int64))
            engine.backward(logits.mean() + (math.inf if dist.get_rank() else 0.0))
            engine.step()
        found.append(engine.outcome.applied)
    return found


def test_a_loss_alone_that_is_not_finite_is_skipped() -> None:
    assert run_ranks(2, infinite_loss) == [[False] * 4] * 2


SEEN = "seen-{rank}.json"  # beside the checkpoints: the samples of the steps that were spoilt


def train_on_spoilt_clips(config: WorkerConfig, bad: tuple[int, ...]) -> None:
    """A rank whose clips are not numbers in the steps `bad`, on rank 1."""
    transform, seen = BatchTransform.__call__, {}

    def spoil(self: BatchTransform, batch: Any, step: int, position: int) -> Any:
        clips, targets = transform(self, batch, step, position)
        if step in bad:
            seen.setdefault(step, []).extend(batch["occurrences"].tolist())
        return clips * (torch.nan if step in bad and dist.get_rank() == 1 else 1.0), targets

    BatchTransform.__call__ = spoil  # type: ignore[method-assign]
    try:
        trainers.train_rank(config)
    finally:
        (Path(config.checkpoints) / SEEN.format(rank=dist.get_rank())).write_text(json.dumps(seen))


def test_a_row_is_counted_over_a_restart_and_its_batches_are_written_down(line: Line) -> None:
    settings = ("data.val=null", "training.checkpoint_every=3", "data.flip=0.0")
    bad = (1, 2, 3)

    def train(*more: str) -> Path:
        return trainers.train(line, "spoilt", *settings, *more, rank_function=train_on_spoilt_clips, arguments=(bad,))

    folder = train("optim.max_skipped_steps=2", "training.max_steps=3")
    assert [m["train/skipped_steps"] for m in trainers.metrics(folder) if "train/skipped_steps" in m][-1] == 2
    assert list(trainers.losses(folder)) == [1]
    with pytest.raises(AssertionError, match=r"loss is nan at step 4, the 3\. in a row that is not finite"):
        train("optim.max_skipped_steps=2")
    report = json.loads((folder / "not-finite-00000004.json").read_text())
    assert [s["step"] for s in report["steps"]] == [4]
    step = report["steps"][0]
    assert step["loss"] == "nan" and step["gradient_norm"] in ("nan", "inf", "-1.0")
    assert math.isfinite(float(step["loss_of_each_rank"][0])) and step["loss_of_each_rank"][1] == "nan"
    keys = read_manifest(f"{line.shards}/train").samples
    for rank in range(2):
        seen = json.loads((folder / SEEN.format(rank=rank)).read_text())["3"]
        assert step["samples_of_each_rank"][rank] == [keys.value("key", i) for i in seen]
    train("optim.max_skipped_steps=3", "training.max_steps=5")
    last = checkpoint.list_checkpoints(str(folder))[-1].position
    assert (last.step, last.skipped_steps, last.skipped_in_row) == (5, 3, 0)
    assert {g["updates"] for g in last.groups} == {2}
    assert list(trainers.losses(folder)) == [1, 5]
