"""The parts of a training's time, as two ranks log them."""

from __future__ import annotations

from tests.support import trainers
from tests.support.line import Line

PARTS = {"time/data_s", "time/forward_s", "time/backward_s", "time/optimizer_s", "time/other_s"}


def test_a_training_logs_its_parts_and_keeps_a_trace(line: Line) -> None:
    folder = trainers.train(line, "timed", "training.max_steps=3", "training.profile=2..3", "training.checkpoint_every=2")
    parts = {m["step"]: m for m in trainers.metrics(folder) if "time/data_s" in m}
    assert sorted(parts) == [2, 3] and all(set(found) >= PARTS for found in parts.values())
    assert all(found["time/backward_s"] > 0 for found in parts.values())
    for name, steps in (("time/evaluation_s", [3]), ("time/checkpoint_s", [2, 3])):
        assert [m["step"] for m in trainers.metrics(folder) if m.get(name, 0) > 0] == steps
    assert [path.name for path in (folder / "profile").iterdir()] == ["steps-2-3.json.gz"]
