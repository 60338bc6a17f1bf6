"""fp16 with its loss scale, and optimizer states on the host: the losses are PyTorch's, on ranks and over a restart."""

from __future__ import annotations

import importlib.util
import itertools
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import net
from tests.support.net import OPTIM
from tests.support.ranks import run_ranks
from vswin_dist.config.schema import OptimSettings, TrainingSettings
from vswin_dist.models import build_model
from vswin_dist.training.deepspeed_setup import WAITLESS
from vswin_dist.training.engine import Engine
from vswin_dist.training.optim import parameter_groups
from vswin_dist.training.skipped_steps import is_finite
from vswin_dist.training.step_metrics import Outcome

STEPS = 6
# Loss scales by which gradients of the network overflow, by stage. Stage 0 is last: once its autocast was used in a process,
# DeepSpeed has the other stages scale as it does, with a scaler of their own.
HUGE = {1: 2.0**20, 2: 2.0**20, 3: 2.0**20, 0: 2.0**18}


def scaled() -> dict[int, Any]:
    """Of each stage in fp16, from a scale that is too large: a whole training, and one in two parts."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    found = {}
    # DeepSpeed trusts fp16 to CPUs that multiply it; others compute it slowly.
    with patch.object(CPU_Accelerator, "is_fp16_supported", lambda self: True):
        for stage in HUGE:
            training = TrainingSettings(zero_stage=stage, precision="fp16")
            start = net.train(training, OPTIM, 0, 0).state | {"loss_scale": {"scale": HUGE[stage], "stable": 0}}
            whole = net.train(training, OPTIM, 0, STEPS, start)
            first = net.train(training, OPTIM, 0, 2, start)
            second = net.train(training, OPTIM, 2, STEPS, first.state)
            same = [torch.equal(second.state["weights"][n], t) for n, t in whole.state["weights"].items()]
            parts = first.losses + second.losses
            scales = (first.state["loss_scale"], second.state["loss_scale"], whole.state["loss_scale"])
            lowest = start | {"loss_scale": {"scale": 1.0, "stable": 3}}
            least = net.train(training, OPTIM, 0, 1, lowest, bad=(0,)).engine
            found[stage] = (whole.applied, whole.losses, whole.norms, parts, all(same), scales, least.outcome)
    return found


def test_fp16_finds_its_scale_and_keeps_it() -> None:
    for ranks in run_ranks(2, scaled):
        for stage, (applied, losses, norms, parts, same, scales, least) in ranks.items():
            skipped = applied.index(True)
            assert 0 < skipped < 4 and applied == [False] * skipped + [True] * (STEPS - skipped), (stage, applied)
            expected, _ = net.plain(OPTIM, STEPS, left_out=range(skipped))
            assert losses == pytest.approx(expected, abs=1e-2), stage
            assert 0.1 < norms[-1] < 10, "the norm is that of the gradient, without the scale"
            assert parts == losses and same, stage
            middle, end, whole = scales
            assert end == whole == {"scale": HUGE[stage] / 2**skipped, "stable": STEPS - skipped}, stage
            assert middle["scale"] == HUGE[stage] / 2 ** min(skipped, 2)
            assert least == Outcome(applied=False, rescaled=False, loss_scale=1.0), stage


def offloaded(precision: str) -> dict[int, Any]:
    """Of each stage: a training with the states on the host, another in two parts, the first of them without."""
    found = {}
    for stage in (1, 2, 3):
        training = TrainingSettings(zero_stage=stage, precision=precision)
        moved = replace(training, offload=True)
        whole = net.train(moved, OPTIM, 0, STEPS)
        first = net.train(training, OPTIM, 0, 2)
        second = net.train(moved, OPTIM, 2, 4, first.state)
        third = net.train(training, OPTIM, 4, STEPS, second.state)
        parts = first.losses + second.losses + third.losses
        found[stage] = (bool(whole.engine.engine.zero_use_cpu_optimizer()), whole.losses, whole.norms, parts)
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_states_on_the_host_train_alike(precision: str, tolerance: float) -> None:
    expected, _ = net.plain(OPTIM, STEPS)
    for ranks in run_ranks(2, offloaded, precision):
        for stage, (moved, losses, norms, parts) in ranks.items():
            assert moved and all(n > 0 for n in norms)
            assert losses == pytest.approx(expected, abs=tolerance), stage
            assert parts == pytest.approx(losses, abs=tolerance), stage


def misplaced() -> dict[int, tuple[set[str], set[str]]]:
    """Of each stage with flat weights: the parameters between multiples of 16 bytes, and those that do not fill them."""
    found = {}
    for stage in (1, 2):
        model, optim = build_model("swin_nano", 5), OptimSettings()
        training = TrainingSettings(zero_stage=stage, precision="bf16")
        module = Engine(model, parameter_groups(model, optim), training, optim, 1, net.CPU).module
        between = {n for n, p in module.named_parameters() if p.data_ptr() % 16}
        found[stage] = between, {n for n, p in module.named_parameters() if p.nbytes % 16}
    return found


def test_weights_lie_where_fast_kernels_take_them() -> None:
    for ranks in run_ranks(2, misplaced):
        for between, odd in ranks.values():
            assert between <= odd and "layers.0.blocks.0.attn.relative_position_bias_table" in odd


ALWAYS, NEVER = 0.05, 1000.0  # norms to which gradients are clipped


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors: on a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.masked_fill_.Tensor)
        return function(*args, **(kwargs or {}))


def stepped(settings: TrainingSettings, optim: OptimSettings) -> tuple[list[float], int]:
    """Losses, norms and weights of a training, and how many numbers the host read in the engine's steps."""
    reads, step = Reads(), Engine.step

    def observed(engine: Engine) -> None:
        with reads:
            step(engine)

    with patch.object(Engine, "step", observed):
        trained = net.train(settings, optim, 0, STEPS)
    assert {n > optim.gradient_clipping for n in trained.norms} == {optim.gradient_clipping == ALWAYS}
    weights = [value for w in trained.state["weights"].values() for value in w.flatten().tolist()]
    return trained.losses + trained.norms + weights, reads.count


def without_and_with_waits() -> list[tuple[tuple[list[float], int], ...]]:
    """Of each stage in bf16, as it is, with DeepSpeed's own functions, and where steps may be skipped.

    Of each with all gradients clipped and with none.
    """
    found = []
    for stage, clipping in itertools.product((1, 2), (ALWAYS, NEVER)):
        training, optim = TrainingSettings(zero_stage=stage, precision="bf16"), replace(OPTIM, gradient_clipping=clipping)
        ours = stepped(training, optim)
        spec = importlib.util.find_spec("deepspeed.runtime.utils")
        assert spec and spec.loader
        spec.loader.exec_module(fresh := importlib.util.module_from_spec(spec))
        with ExitStack() as patches:
            patches.enter_context(patch("vswin_dist.training.engine.without_a_look_at_the_norm", nullcontext))
            for module, functions in WAITLESS.items():
                for name in (f.__name__ for f in functions):
                    patches.enter_context(patch(f"{module}.{name}", getattr(fresh, name)))
            theirs = stepped(training, optim)
        found.append((ours, theirs, stepped(training, replace(optim, max_skipped_steps=1))))
    return found


def not_finite() -> list[tuple[bool, float]]:
    """Whether an update was made by a gradient that is not finite, and its norm, where no step may be skipped."""
    with patch.object(net, "save", lambda *_: {}):  # it refuses what is not finite
        trained = [net.train(TrainingSettings(zero_stage=z, precision="bf16"), OPTIM, 0, 2, bad=(1,)) for z in (1, 2)]
    return [(t.applied[-1], t.norms[-1]) for t in trained]


def test_a_step_in_bf16_waits_for_nothing_and_has_the_bits_of_one_that_does() -> None:
    for ranks in run_ranks(2, without_and_with_waits):
        for (ours, read), (theirs, read_by_theirs), (checked, read_to_check) in ranks:
            assert ours == theirs == checked
            assert read == 0 and read_by_theirs >= STEPS and read_to_check >= STEPS


def test_a_gradient_that_no_one_waited_for_is_still_known_not_to_be_finite() -> None:
    for ranks in run_ranks(2, not_finite):
        for applied, norm in ranks:
            assert applied and not is_finite(1.0, norm)


EVERYTHING = replace(OPTIM, freeze=("body.0",), freeze_epochs=1, layer_decay=0.5, max_skipped_steps=1)
BAD = (1, 4)  # while some are frozen, and after


def everything() -> dict[int, Any]:
    """Of each stage, offloaded where it can be: a training with all that may be set, and one in two parts."""
    found = {}
    for stage in range(4):
        training = TrainingSettings(zero_stage=stage, precision="fp32", ema_decay=0.8, offload=stage > 0)
        whole = net.train(training, EVERYTHING, 0, STEPS, bad=BAD)
        first = net.train(training, EVERYTHING, 0, 2, bad=BAD)
        second = net.train(training, EVERYTHING, 2, STEPS, first.state, bad=BAD)
        tensors = whole.state["weights"] | whole.state["moments"]
        parts = second.state["weights"] | second.state["moments"]
        same = all(torch.equal(parts[n], t) for n, t in tensors.items())
        found[stage] = (whole.applied, whole.losses, first.losses + second.losses, same, tensors)
    return found


def test_all_settings_together_are_the_same_in_every_stage() -> None:
    (found, _) = run_ranks(2, everything)
    for stage, (applied, losses, parts, same, tensors) in found.items():
        assert applied == [step not in BAD for step in range(STEPS)], stage
        assert losses == pytest.approx(found[0][1], abs=1e-6, nan_ok=True), stage
        assert parts == pytest.approx(losses, abs=0, nan_ok=True) and same, stage
        assert tensors.keys() == found[0][4].keys()
        assert all(torch.allclose(t, found[0][4][n], atol=1e-6) for n, t in tensors.items()), stage
