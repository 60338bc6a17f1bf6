"""The trainer and DeepSpeed on two ranks train exactly as a plain PyTorch loop does.

That Ray's ranks have the losses of these is seen by tests/faults/test_drill.py.
"""

from __future__ import annotations

import pytest

from tests.support import plain, trainers
from tests.support.line import SMALL, Line
from vswin_dist.config import load_settings

EVERYTHING = (
    "data.flip=0.5",
    "data.rand_augment_ops=2",
    "data.erasing=0.25",
    "data.mixup=0.2",
    "data.cutmix=1.0",
    "optim.label_smoothing=0.1",
)


def losses(line: Line, stage: int, steps: int, *more: str) -> tuple[list[float], list[float]]:
    """The first losses of two ranks, and of a plain loop."""
    settings = [
        *SMALL,
        "training.epochs=20",
        f"training.max_steps={steps}",
        f"training.checkpoint_every={steps}",
        "training.global_batch=8",
        "training.micro_batch=4",
        "data.val=null",
        "optim.warmup_epochs=4",
        f"training.zero_stage={stage}",
        *more,
    ]
    found = trainers.losses(trainers.train(line, "ranks", *settings))
    _, expected = plain.train(load_settings("demo", ["run.name=plain", *line.sets(), *settings]), steps)
    return [found[i + 1] for i in range(steps)], expected


@pytest.mark.faults
def test_fifty_steps_have_the_losses_of_a_plain_loop(line: Line) -> None:
    found, expected = losses(line, 2, 50)
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1, "nothing was learned: the comparison would show nothing"


def test_so_do_ten_with_every_augmentation(line: Line) -> None:
    found, expected = losses(line, 1, 10, *EVERYTHING, "training.deterministic=true")
    assert found == pytest.approx(expected, abs=1e-4)
