"""The engine's state keyed by parameter name moves between ZeRO stages and numbers of ranks without changing a step."""

import contextlib
import io

import pytest
import torch

from tests.support import net
from tests.support.net import OPTIM, Net, State
from tests.support.ranks import run_ranks
from vswin_dist.config.schema import TrainingSettings
from vswin_dist.training.engine import Engine
from vswin_dist.training.optim import parameter_groups

STEPS = 6


def steps(stage: int, precision: str, first: int, last: int, state: State | None) -> tuple[list[float], State]:
    """Train `first`..`last` from `state`; the losses of the global batches and the state at the end."""
    found = net.train(TrainingSettings(zero_stage=stage, precision=precision), OPTIM, first, last, state)
    assert all(norm > 0 for norm in found.norms)
    return found.losses, found.state


CASES = [  # (ranks, stage) before -> after
    ((2, 2), (2, 2)),
    ((2, 2), (1, 2)),
    ((1, 2), (2, 2)),
    ((2, 3), (2, 3)),
    ((2, 3), (1, 3)),
    ((1, 3), (2, 3)),
    ((2, 1), (2, 3)),
    ((2, 3), (2, 0)),
    ((2, 0), (1, 1)),
]


def _all_cases(precision: str, mine: int, before: dict) -> dict:
    """In one process group: whole runs of each stage (before is empty), or the second halves of the cases."""
    if not before:
        found = {}
        for stage in range(4):
            whole, end = steps(stage, precision, 0, STEPS, None)
            half, state = steps(stage, precision, 0, STEPS // 2, None)
            assert half == whole[: STEPS // 2]
            found[stage] = (whole, end, state)
        return found
    found = {}
    for a, b in CASES:
        if b[0] == mine:
            found[a, b] = steps(b[1], precision, STEPS // 2, STEPS, before[a])
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_state_moves_between_stages_and_ranks(precision: str, tolerance: float) -> None:
    wholes = {w: run_ranks(w, _all_cases, precision, w, {})[0] for w in (1, 2)}
    before = {(w, stage): wholes[w][stage][2] for w in wholes for stage in wholes[w]}
    reference = wholes[2][2][0]
    for w in wholes:
        for whole, _, _ in wholes[w].values():
            assert whole == pytest.approx(reference, abs=tolerance)
    for w in (1, 2):
        for (a, b), (losses, end) in run_ranks(w, _all_cases, precision, w, before)[0].items():
            assert losses == pytest.approx(reference[STEPS // 2 :], abs=tolerance), (a, b)
            for name, value in wholes[a[0]][a[1]][1]["weights"].items():
                assert torch.allclose(end["weights"][name], value, atol=tolerance), (a, b, name)


def test_bf16_keeps_the_fp32_weights_it_was_given() -> None:
    assert run_ranks(2, _fp32_weights)[0] == 0.0


def _fp32_weights() -> float:
    torch.manual_seed(0)
    model = Net()
    exact = {n: p.detach().clone() for n, p in model.named_parameters()}
    training = TrainingSettings(workers=2, micro_batch=1, zero_stage=2, precision="bf16")
    engine = Engine(model, parameter_groups(model, OPTIM), training, OPTIM, 1, torch.device("cpu"))
    return max(float((t - exact[n]).abs().max()) for n, t in engine.weights())


def test_nothing_is_printed_as_an_engine_starts() -> None:
    assert run_ranks(1, _printed)[0] == ""


def _printed() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for stage in range(4):
            model = Net()
            training = TrainingSettings(micro_batch=1, zero_stage=stage, precision="bf16")
            Engine(model, parameter_groups(model, OPTIM), training, OPTIM, 1, torch.device("cpu"))
    return printed.getvalue()
