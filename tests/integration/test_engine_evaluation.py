"""Validation through the engine between two steps of a training, and a loss that is lost, on two real ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from tests.support.ranks import run_ranks
from vswin_dist.config import load_settings
from vswin_dist.config.schema import OptimSettings, TrainingSettings
from vswin_dist.errors import WorkFailed
from vswin_dist.evaluation.evaluate import Rank
from vswin_dist.manifest import read_manifest
from vswin_dist.models import VideoSwin, build_model, swin3d
from vswin_dist.models.stochastic import sample_keys
from vswin_dist.training import loop
from vswin_dist.training.engine import Engine, deepspeed_config
from vswin_dist.training.optim import parameter_groups

CPU = torch.device("cpu")


def rank() -> Rank:
    return Rank(dist.get_rank(), dist.get_world_size(), CPU)


def train_and_validate(val: str, stage: int, between: bool) -> tuple[list[float], float]:
    """The losses of two steps in bf16, with validations before, `between` and after them; the last score's loss."""
    s = load_settings("demo", ["run.name=x", f"data.train={val}", f"data.val={val}", f"training.zero_stage={stage}",
                               "training.precision=bf16", "training.micro_batch=2", "data.workers=0", "data.sampling=dense",
                               "evaluation.batch=4", "evaluation.clips=1", "evaluation.crops=1"])
    manifest = read_manifest(val)
    torch.manual_seed(0)
    model = build_model("swin_nano", num_classes=len(manifest.classes))
    engine = Engine(model, parameter_groups(model.named_parameters(), s.optim), s.training, s.optim, 1, CPU)
    losses = []
    for step in range(2):
        if between:
            loop.validate(engine, manifest, s, rank(), None, step)
        generator = torch.Generator().manual_seed(step)
        clips = torch.randn(2, 3, s.data.frames, s.data.size, s.data.size, generator=generator).to(engine.input_dtype)
        engine.set_learning_rate(1.0)
        loss = torch.nn.functional.cross_entropy(engine.forward(clips, torch.arange(2)).float(), torch.tensor([0, 1]))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        assert engine.module.training
    return losses, loop.validate(engine, manifest, s, rank(), None, 2)["val/loss"]


@pytest.mark.parametrize("stage", [0, 3])
def test_validation_in_bf16_changes_no_step(motion_shards: Path, stage: int) -> None:
    val = str(motion_shards / "val")
    plain, validated = (run_ranks(2, train_and_validate, val, stage, between) for between in (False, True))
    assert validated == plain
    assert validated[0] == validated[1] and 0 < validated[0][1] < 10


def compiled_steps(compiled: bool) -> tuple[list[float], int]:
    """The losses of three steps at ZeRO-2 in fp32, and how many graphs were made; the compiler itself is left out."""
    graphs = CompileCounterWithBackend("aot_eager")
    captured = torch.compile(VideoSwin._compute, dynamic=False, fullgraph=True, backend=graphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swin3d, "_compiled", lambda: captured)
        optim = OptimSettings(lr=1e-2, gradient_clipping=1.0)
        training = TrainingSettings(micro_batch=2, global_batch=4, zero_stage=2, precision="fp32")
        torch.manual_seed(0)
        model = build_model("swin_nano", num_classes=2, drop_path_rate=0.5, depths=(1, 1, 1), compile=compiled)
        engine = Engine(model, parameter_groups(model.named_parameters(), optim), training, optim, 1, CPU)
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


def test_a_compiled_model_trains_in_the_engine_as_a_plain_one() -> None:
    for (plain, none), (compiled, one) in zip(*(run_ranks(2, compiled_steps, c) for c in (False, True)), strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4)
        assert (none, one) == (0, 1)


def lose_a_loss() -> str:
    """Rank 1 alone has a loss that is none; what each rank is told."""
    lost = float("nan") if dist.get_rank() == 1 else 1.0
    pending = [loop.StepFigures(4, torch.tensor(lost), torch.tensor(1.0), 0.0, {}, [])]
    plan: Any = SimpleNamespace(global_batch=2, steps_per_epoch=4)
    try:
        loop.flush(pending, 0.0, plan, None, rank(), 9)
    except WorkFailed as error:
        return str(error)
    return "went on"


def test_a_loss_that_is_not_finite_on_one_rank_stops_all() -> None:
    messages = run_ranks(2, lose_a_loss)
    assert messages[0] == messages[1] and messages[0].startswith("loss is nan at step 5;")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_stage_checks_for_overflow_in_bf16(stage: int) -> None:
    s = load_settings("demo", ["run.name=x", "data.train=x", f"training.zero_stage={stage}", "training.precision=bf16"])
    from deepspeed.runtime.precision_config import get_bfloat16_config

    found = get_bfloat16_config(deepspeed_config(s.training, s.optim, 1))
    assert found.enabled and not found.check_grad_overflow
