"""Predicted memory, held against what was measured on a GPU and on CPUs (docs/benchmarks.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vswin_dist.models import build_model
from vswin_dist.models.swin.counting import count_parameters
from vswin_dist.models.swin.presets import PRESETS
from vswin_dist.planning.memory import Setup, blocks, nearest_that_fit, predict, step_peak

GIB = 2**30
H200 = Setup((32, 224, 224), 8, 1, 0, "bf16", "cuda")
CPU = Setup((16, 224, 224), 1, 1, 0, "fp32", "cpu")


def added(name: str, checkpointing: str, setup: Setup) -> float:
    """What a step adds: activations and gradients."""
    architecture = replace(PRESETS[name], gradient_checkpointing=checkpointing)
    parts = list(blocks(architecture, setup.clip, setup.micro_batch))
    return step_peak(parts, architecture.gradient_checkpointing, setup, setup.element)


@pytest.mark.parametrize(("checkpointing", "measured"), [("none", 19.0), ("selective", 13.2), ("block", 3.8)])
def test_a_step_of_swin_l_on_a_gpu(checkpointing: str, measured: float) -> None:
    assert added("swin_l", checkpointing, H200) / GIB == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(
    ("checkpointing", "measured"), [("none", 1.22), ("block", 0.58), ("selective", 0.61), ("stage", 0.89)]
)
def test_a_step_of_swin_b_on_a_cpu(checkpointing: str, measured: float) -> None:
    assert added("swin_b", checkpointing, CPU) / 1e9 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("name", "frames", "micro_batch", "stage", "checkpointing", "measured"),
    [
        ("swin_t", 8, 8, 0, "none", 1.52),
        ("swin_t", 16, 8, 1, "none", 2.11),
        ("swin_t", 16, 16, 2, "block", 1.96),
        ("swin_s", 16, 8, 2, "selective", 2.40),
        ("swin_b", 8, 4, 1, "none", 2.59),
        ("swin_b", 16, 4, 2, "block", 2.38),
        ("swin_b", 16, 4, 2, "stage", 2.85),
    ],
)
def test_a_training_on_two_cpu_ranks(
    name: str, frames: int, micro_batch: int, stage: int, checkpointing: str, measured: float
) -> None:
    """What a rank has resident, its libraries included; ZeRO 3, whose heap is full of holes, is further off."""
    setup = Setup((frames, 112, 112), micro_batch, 2, stage, "fp32", "cpu")
    found = predict(replace(PRESETS[name], gradient_checkpointing=checkpointing), setup)
    assert found.total / GIB == pytest.approx(measured, rel=0.15)


def test_a_training_of_swin_l_on_a_gpu() -> None:
    found = predict(PRESETS["swin_l"], replace(H200, micro_batch=32, zero_stage=2))
    assert found.total / GIB == pytest.approx(80.2, rel=0.05)


@pytest.mark.parametrize("name", ["swin_nano", "swin_t", "swin_s", "swin_b", "swin_l"])
def test_blocks_hold_the_parameters_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
    counted = sum(b.parameters for b in blocks(PRESETS[name], (32, 224, 224), 1))
    assert counted == pytest.approx(count_parameters(model) - 400 * model.head.in_features, rel=0.005)


def test_states_are_split_over_the_ranks_by_stage() -> None:
    parameters = 196e6
    found = [predict(PRESETS["swin_l"], replace(H200, world_size=8, zero_stage=stage)) for stage in range(4)]
    assert found[0].optimizer == pytest.approx(8 * parameters, rel=0.02)
    assert [f.optimizer / found[1].optimizer for f in found[1:]] == [1, 1, 1]
    assert found[1].optimizer == pytest.approx(12 * parameters / 8, rel=0.02)
    assert found[1].gradients / found[2].gradients == pytest.approx(8, rel=1e-6)


def test_an_average_is_a_third_state_and_offloaded_ones_leave_the_gpu() -> None:
    parameters, setup = 196e6, replace(H200, world_size=8, zero_stage=2)
    averaged = predict(PRESETS["swin_l"], replace(setup, averages=True))
    assert averaged.optimizer == pytest.approx(16 * parameters / 8, rel=0.02)
    offloaded = predict(PRESETS["swin_l"], replace(setup, offloads=True))
    assert offloaded.optimizer == 0 and averaged.total - offloaded.total == averaged.optimizer


def test_what_would_fit_is_named_nearest_first() -> None:
    setup = replace(H200, micro_batch=32, world_size=8, zero_stage=1)
    assert predict(PRESETS["swin_l"], setup).total > 70 * GIB
    fits = nearest_that_fit(PRESETS["swin_l"], setup, 70 * GIB, batch=32)
    assert fits == ["training.micro_batch=16", "model.gradient_checkpointing=selective"]
    assert nearest_that_fit(PRESETS["swin_l"], setup, GIB, batch=32) == []
