"""A training whose validation no longer gets better ends by itself, also where it was stopped in between."""

from __future__ import annotations

from tests.support import trainers
from tests.support.line import Line
from vswin_dist.evaluation.predictions import read
from vswin_dist.training import checkpoint, validated

# Nothing is learned at this rate: the first evaluation stays the best.
SETTINGS = ("training.epochs=9", "evaluation.every_epochs=1", "evaluation.patience=2", "optim.lr=1e-12", "data.flip=0.0")


def test_a_training_ends_when_its_patience_is_over(line: Line) -> None:
    folder = trainers.train(line, "patient", *SETTINGS, "training.max_steps=6")  # of which the second evaluation is the last
    last = checkpoint.list_checkpoints(str(folder))[-1]
    assert last.position.evaluations_since_best == 1
    found = read(f"{last.url}/{validated.FILE}")  # of every video, for the page
    hits = found.found.probabilities.argmax(1) == found.found.labels
    assert (len(hits), 100 * hits.mean()) == (12, last.position.metrics["val/top1"])
    trainers.train(line, "patient", *SETTINGS)
    steps = [m["step"] for m in trainers.metrics(folder) if "val/top1" in m]
    assert steps == [3, 6, 9]
    end = checkpoint.list_checkpoints(str(folder))[-1].position
    assert (end.step, end.evaluations_since_best) == (9, 2)
    trainers.train(line, "patient", *SETTINGS)  # as after a driver that died before it registered
    assert max(trainers.losses(folder)) == 9
