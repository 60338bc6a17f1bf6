"""A run's name is submitted twice: one driver trains, whatever the other one does."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.support.drill import Drill, record
from tests.support.line import SMALL, Line, own_lines
from tests.support.waiting import below, wait_until
from vswin_dist.training import checkpoint

STEPS = (
    "training.workers=1",
    "training.checkpoint_every=5",
    "training.epochs=400",
    "training.zero_stage=2",
    "evaluation.every_epochs=400",
)


def files(folder: Path) -> dict[str, bytes]:
    """All that counts of a run: without what its drivers and ranks tell one another, by names of their own."""
    found = [p for p in below(folder, "*") if p.is_file() and "ray" not in p.relative_to(folder).parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if not p.name.startswith(("failure-", "stop-"))}


def rows(line: Line) -> list[tuple[object, ...]]:
    """Every metric, the state, and the registered versions of the run."""
    client, run = MlflowClient(line.uri), line.run_of("one")
    histories = [client.get_metric_history(run.info.run_id, name) for name in sorted(run.data.metrics)]
    metrics = [(m.key, m.step, m.value, m.timestamp) for history in histories for m in history]
    return [*metrics, (run.info.status, run.info.end_time), *[(v.version,) for v in client.search_model_versions()]]


def test_a_second_driver_is_refused_and_one_that_was_taken_over_changes_nothing(
    line: Line, request: pytest.FixtureRequest
) -> None:
    command = ("--recipe", "demo", "run.name=one", *line.sets(), *SMALL, *STEPS)
    line.anew = True  # all processes of a driver are below it
    log, drill = line.home / "first.log", Drill(line, "one", line.home / "second.log")
    first = line.start("train", *command, output=log)
    family: list[psutil.Process] = []
    try:
        wait_until(lambda: drill.committed() >= 5, first)
        refused = line.run("train", *command, code=2).strip().splitlines()[-1]
        assert refused.startswith(f"error: the training run 'one' is held by pid {first.pid} on "), refused
        assert "run.take_over=true takes the run from it" in refused
        at = drill.committed()
        wait_until(lambda: drill.committed() > at, first)  # it trains on

        drill.happens("a driver and its ranks are cut off, taken over, and come back: they change nothing")
        family = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        steps = drill.committed() + 6
        with line.running("train", *command, "run.take_over=true", output=drill.log) as second:
            wait_until(lambda: drill.committed() >= steps, second)
            below = psutil.Process(second.pid).children(recursive=True)
            ranks = [p for p in below if any("RayTrainWorker" in part for part in p.cmdline())]
            second.terminate()  # as `ray job stop` and batch systems do
            assert second.wait(60) == 130, drill.log.read_text()[-4000:]
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert ranks and not alive, f"outlived their driver: {alive}"
        output, done = drill.log.read_text(), drill.committed()
        assert f"the training run 'one' is taken over from pid {first.pid}" in output and "resumed from" in output
        assert f"stopped after step {done};" in output and own_lines(output)[-1] == "error: interrupted"
        assert line.run_of("one").info.status == "KILLED"
        assert sorted(line.losses("one")) == list(range(1, done + 1)), "steps were done that no checkpoint holds"
        assert not list((line.home / "runs" / "one").rglob("stop-*"))
        folder = line.home / "runs" / "one"
        before, logged = files(folder), rows(line)

        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        assert first.wait(timeout=200) == 1, log.read_text()[-4000:]
        assert "was taken over by pid" in own_lines(log.read_text())[-1], log.read_text()[-4000:]
        time.sleep(2)  # its ranks end with it
        after = files(folder)
        assert {name: after.get(name) for name in before} == before, "it removed or changed a file"
        late = after.keys() - before.keys()
        assert not [name for name in late if name.endswith(checkpoint.COMMIT)], f"it committed {late}"
        assert rows(line) == logged
        record(request, "the same name submitted twice: the second is refused", "no stop", "0", "-")
        record(request, "SIGTERM: exit 130, every step is in a checkpoint", "as below", "0", "-")
        for row in drill.rows():
            record(request, *row)
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        first.kill()
        first.wait()
