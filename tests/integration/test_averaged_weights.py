"""The average of the weights is PyTorch's own, on ranks and over a restart; it is what is evaluated and registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support import net, plain, trainers
from tests.support.line import Line
from tests.support.net import OPTIM
from tests.support.ranks import run_ranks
from vswin_dist.config import load_settings
from vswin_dist.config.schema import TrainingSettings
from vswin_dist.models.weights.portable import load_model
from vswin_dist.training import averaged_model, checkpoint

STEPS, DECAY = 6, 0.8


def averaged(precision: str) -> dict[int, Any]:
    """Of each stage: a whole training, one in two parts with the average evaluated between them, and what it says."""
    found = {}
    x, keys = net.batch(0)[0], torch.zeros(net.GLOBAL_BATCH, dtype=torch.int64)
    for stage in range(4):
        training = TrainingSettings(zero_stage=stage, precision=precision, ema_decay=DECAY)
        whole = net.train(training, OPTIM, 0, STEPS)
        first = net.train(training, OPTIM, 0, 2)
        with first.engine.full_module(averaged=True), torch.no_grad():
            pass
        second = net.train(training, OPTIM, 2, STEPS, net.save(first.engine, 2))
        with second.engine.full_module(averaged=True) as module, torch.no_grad():
            logits = module(x.to(second.engine.input_dtype), keys).float()
        end = net.save(second.engine, STEPS)
        same = [torch.equal(end[k][n], t) for k in ("weights", "moments") for n, t in whole.state[k].items()]
        averages = {n.removeprefix("ema."): t for n, t in whole.state["moments"].items() if n.startswith("ema.")}
        found[stage] = (whole.losses, first.losses + second.losses, all(same), averages, logits)
    return found


def pytorch() -> AveragedModel:
    """The average by PyTorch of the plain training."""
    torch.manual_seed(0)
    model = AveragedModel(net.Net(), multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for step in range(STEPS + 1):
        _, weights = net.plain(OPTIM, step)
        now = net.Net()
        now.load_state_dict(weights)
        model.update_parameters(now)
    return model


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_the_average_is_that_of_pytorch(precision: str, tolerance: float) -> None:
    expected = pytorch()
    weights = dict(expected.module.named_parameters())
    says = expected(net.batch(0)[0], torch.zeros(1)).detach()
    for ranks in run_ranks(2, averaged, precision):
        for stage, (losses, parts, same, averages, logits) in ranks.items():
            assert parts == losses and same, stage
            assert averages.keys() == weights.keys()
            assert all(torch.allclose(averages[n], weights[n], atol=tolerance) for n in weights), stage
            assert torch.allclose(logits, says, atol=5 * tolerance), stage


def test_the_average_is_evaluated_and_exported(line: Line) -> None:
    settings = ("training.ema_decay=0.7", "evaluation.ema=true", "evaluation.every_epochs=1", "optim.lr=0.02")
    folder = trainers.train(line, "averaged", *settings, "training.precision=fp32", "training.zero_stage=2")
    last = checkpoint.list_checkpoints(str(folder))[-1]
    own = load_settings("demo", ["run.name=x", *line.sets(), "evaluation.batch=8"])
    scores = {}
    for name, url in (("last", last.url), ("averaged", averaged_model.export(last.url))):
        scores[name] = plain.score(load_model(url)[0], own).metrics()
    assert scores["averaged"] == pytest.approx(last.position.metrics, rel=1e-4)
    assert scores["last"] != pytest.approx(last.position.metrics, rel=1e-4)
