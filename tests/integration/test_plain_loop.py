"""Ray and DeepSpeed on two ranks train exactly as a plain PyTorch loop does."""

from __future__ import annotations

import pytest

from tests.support import plain
from tests.support.line import SMALL, Line
from vswin_dist.config import load_settings

STEPS = 50


EVERYTHING = ["data.flip=0.5", "data.rand_augment_ops=2", "data.erasing=0.25", "data.mixup=0.2", "data.cutmix=1.0",
              "optim.label_smoothing=0.1"]


@pytest.mark.parametrize(("stage", "more"), [(2, []), (1, EVERYTHING)], ids=["plain", "augmented"])
def test_fifty_steps_have_the_losses_of_a_plain_loop(line: Line, stage: int, more: list[str]) -> None:
    settings = [*SMALL, "training.epochs=20", f"training.max_steps={STEPS}", "training.checkpoint_every=50", "data.val=null",
                "optim.warmup_epochs=4", f"training.zero_stage={stage}", *more]
    line.train("ranks", *settings)
    _, expected = plain.train(load_settings("demo", ["run.name=plain", *line.sets(), *settings]), STEPS)
    losses = line.losses("ranks")
    assert [losses[i + 1] for i in range(STEPS)] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1, "nothing was learned: the comparison would show nothing"
