"""Validation through the engine between two steps of a training run, and a loss that is lost, on two real ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support.ranks import run_ranks
from vswin_dist.config import Settings, load_settings
from vswin_dist.config.schema import OptimSettings, TrainingSettings
from vswin_dist.device import Rank
from vswin_dist.manifest import Manifest, read_manifest
from vswin_dist.models import VideoSwin, build_model
from vswin_dist.models.stochastic import sample_keys
from vswin_dist.models.swin import model as swin_model
from vswin_dist.tracking import NullRun, RunReference
from vswin_dist.training.deepspeed_setup import deepspeed_config
from vswin_dist.training.engine import Engine
from vswin_dist.training.optim import parameter_groups
from vswin_dist.training.step_metrics import StepMetrics, average
from vswin_dist.training.trainer import Trainer, WorkerConfig

CPU = torch.device("cpu")


def rank() -> Rank:
    return Rank(dist.get_rank(), dist.get_world_size(), CPU)


def evaluating_trainer(s: Settings, engine: Engine, manifest: Manifest) -> Trainer:
    """A trainer without what an evaluation does not use."""
    nothing: Any = None
    config = WorkerConfig(s, "", RunReference("none", ""))
    parts = (nothing, engine, nothing, nothing, nothing)  # plan, engine, loader, transform, ledger
    return Trainer(config, rank(), manifest, manifest, *parts, NullRun(), nothing, last_step=2)


def train_and_validate(val: str, stage: int) -> list[tuple[list[float], float]]:
    """Two trainings, without and with validations between their steps; see `losses_and_score`."""
    return [losses_and_score(val, stage, between) for between in (False, True)]


def losses_and_score(val: str, stage: int, between: bool) -> tuple[list[float], float]:
    """The losses of two steps in bf16, with validations before and between them or not; the loss of one after them."""
    s = load_settings(
        "demo",
        [
            "run.name=x",
            f"data.train={val}",
            f"data.val={val}",
            f"training.zero_stage={stage}",
            "training.precision=bf16",
            "training.micro_batch=2",
            "data.workers=0",
            "data.sampling=dense",
            "evaluation.batch=4",
            "evaluation.clips=1",
            "evaluation.crops=1",
        ],
    )
    manifest = read_manifest(val)
    torch.manual_seed(0)
    model = build_model("swin_nano", num_classes=len(manifest.classes), depths=(1, 1, 1))
    engine = Engine(model, parameter_groups(model, s.optim), s.training, s.optim, 1, CPU)
    losses = []
    trainer = evaluating_trainer(s, engine, manifest)
    for step in range(2):
        if between:
            trainer.evaluate(step)
        generator = torch.Generator().manual_seed(step)
        clips = torch.randn(2, 3, s.data.frames, s.data.size, s.data.size, generator=generator).to(engine.input_dtype)
        engine.set_learning_rate(1.0)
        loss = torch.nn.functional.cross_entropy(engine.forward(clips, torch.arange(2)).float(), torch.tensor([0, 1]))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        assert engine.module.training
    loss = trainer.evaluate(2)["val/loss"]
    last = trainer.timer.heartbeat.last
    # Beats: of the start, one of each evaluation as a whole, of each of its rounds, and of its end.
    assert (last.phase, last.step) == ("evaluation", 2) and last.number > 1 + 3, last
    return losses, loss


@pytest.mark.parametrize("stage", [0, 3])
def test_validation_in_bf16_changes_no_step(motion_shards: Path, stage: int) -> None:
    val = str(motion_shards / "val")
    ranks = run_ranks(2, train_and_validate, val, stage)
    assert ranks[0] == ranks[1]
    plain, validated = ranks[0]
    assert validated == plain and 0 < plain[1] < 10


def plain_and_compiled() -> list[tuple[list[float], int]]:
    """The steps of a plain model and of a compiled one; see `steps`."""
    return [steps(compiled) for compiled in (False, True)]


def steps(compiled: bool) -> tuple[list[float], int]:
    """The losses of three steps at ZeRO-2 in fp32, and how many graphs were made; the compiler itself is left out."""
    graphs = CompileCounterWithBackend("aot_eager")
    captured = torch.compile(VideoSwin._compute, dynamic=False, fullgraph=True, backend=graphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swin_model, "_compiled", lambda: captured)
        optim = OptimSettings(lr=1e-2, gradient_clipping=1.0)
        training = TrainingSettings(micro_batch=2, global_batch=4, zero_stage=2, precision="fp32")
        torch.manual_seed(0)
        model = build_model("swin_nano", num_classes=2, drop_path_rate=0.5, depths=(1, 1, 1), compile=compiled)
        engine = Engine(model, parameter_groups(model, optim), training, optim, 1, CPU)
        generator, losses = torch.Generator().manual_seed(dist.get_rank()), []
        for step in range(3):
            clips = torch.randn(2, 3, 8, 32, 32, generator=generator)
            engine.set_learning_rate(1.0)
            logits = engine.forward(clips, sample_keys(0, step, torch.arange(2)))
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses, graphs.frame_count


@pytest.mark.faults
def test_a_compiled_model_trains_in_the_engine_as_a_plain_one() -> None:
    for (plain, none), (compiled, one) in run_ranks(2, plain_and_compiled):
        assert compiled == pytest.approx(plain, rel=1e-4)
        assert (none, one) == (0, 1)


def lose_a_loss() -> list[tuple[float, float]]:
    """Rank 1 alone has a loss that is not finite; what each rank finds."""
    lost = float("nan") if dist.get_rank() == 1 else 1.0
    return average([StepMetrics(4, torch.tensor(lost), torch.tensor(1.0), 0.0, {}, [])], rank())[0]


def test_a_loss_that_is_not_finite_on_one_rank_is_so_on_all() -> None:
    assert [math.isnan(found[0][0]) for found in run_ranks(2, lose_a_loss)] == [True, True]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_stage_checks_for_overflow_in_bf16_unless_steps_may_be_skipped(stage: int) -> None:
    s = load_settings("demo", ["run.name=x", "data.train=x", f"training.zero_stage={stage}", "training.precision=bf16"])
    from deepspeed.runtime.precision_config import get_bfloat16_config

    found = get_bfloat16_config(deepspeed_config(s.training, s.optim, 1, torch.device("cpu")))
    assert found.enabled and not found.check_grad_overflow
    skipping = replace(s.optim, max_skipped_steps=1)
    assert get_bfloat16_config(deepspeed_config(s.training, skipping, 1, torch.device("cpu"))).check_grad_overflow
