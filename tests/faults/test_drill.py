"""One training through every fault of its ranks and its driver: its losses are those of an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support import trainers
from tests.support.checkpoints import flip_a_bit
from tests.support.drill import Drill, record
from tests.support.line import SMALL, Line, running_actors, running_ranks
from tests.support.waiting import wait_until
from vswin_dist.training import checkpoint

SETTINGS = (
    "training.checkpoint_every=1",
    "training.keep_checkpoints=3",
    "training.epochs=400",
    "training.global_batch=4",
    "training.micro_batch=2",
    "training.zero_stage=2",
    "evaluation.every_epochs=400",
)


@contextmanager
def submitted(drill: Drill, *settings: str) -> Iterator[subprocess.Popen[str]]:
    """The training's command, its output at the end of the drill's log; the process is killed with the block."""
    own = (
        "--recipe",
        "demo",
        f"run.name={drill.name}",
        *drill.line.sets(),
        *SMALL,
        *SETTINGS,
        "training.hang_s=5",
        *settings,
    )
    part = drill.log.with_name("submission.log")
    with drill.line.running("train", *own, output=part) as process:
        try:
            yield process
        except AssertionError as error:
            raise AssertionError(f"{error}\n{part.read_text()[-6000:]}") from error
    with drill.log.open("a") as log:
        log.write(part.read_text())


def ended(ranks: list[psutil.Process]) -> None:
    """The ranks end with their driver, by themselves."""
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert ranks and not alive, f"outlived their driver: {alive}"


def test_ranks_and_drivers_that_die_hang_and_are_stopped(
    cluster_line: Line, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cluster_line.env |= {"RAY_DEDUP_LOGS": "0"}
    drill = Drill(cluster_line, "drill", tmp_path / "drill.log")
    folder = cluster_line.home / "runs" / "drill" / "0001"

    def goes_on(process: subprocess.Popen[str], steps: int = 2) -> list[psutil.Process]:
        """The ranks, once they have committed more steps."""
        before = drill.committed()
        wait_until(lambda: drill.committed() >= before + steps, process)
        return running_ranks()

    with submitted(drill) as process:
        ranks = goes_on(process)
        drill.happens("a rank is killed")
        ranks[-1].kill()
        ranks = goes_on(process)
        drill.happens("a rank hangs")
        ranks[-1].suspend()
        ranks = goes_on(process)
        drill.happens("all ranks are killed, and the newest checkpoint has a flipped bit")
        for rank in ranks:
            rank.kill()
        psutil.wait_procs(ranks, timeout=30)
        flip_a_bit(folder / f"step-{drill.committed():08d}" / checkpoint.MODEL)
        ranks = goes_on(process)
        wait_until(lambda: "passing over a damaged" in drill.log.with_name("submission.log").read_text(), process)
        drill.happens("the driver is killed")
        process.kill()
        ended(ranks)

    with submitted(drill) as process:
        ranks = goes_on(process)
        drill.happens("Ray's training controller is killed: exit 1, the same command")
        running_actors("TrainController")[-1].kill()
        assert process.wait(60) == 1
        ended(ranks)

    with submitted(drill, "training.grace_s=1") as process:
        ranks = goes_on(process)
        try:
            drill.happens("SIGTERM while a rank hangs, to the end of the grace time")
            ranks[-1].suspend()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 130
        finally:
            with suppress(psutil.NoSuchProcess):
                ranks[-1].kill()
            psutil.wait_procs(ranks, timeout=30)

    steps = drill.committed() + 3
    with submitted(drill, "training.workers=1", f"training.max_steps={steps}") as process:
        assert process.wait(300) == 0
    output = drill.log.read_text()
    assert "did not answer: rank" in output and "process stopped" in output
    assert output.count("run (vswin_dist/training/trainer.py") >= 2, "the stacks of both ranks are not in the log"
    stacks = {path for path in cluster_line.artifacts("drill") if path.startswith("hang/")}
    assert any(path.replace("-rank-1", "-rank-0") in stacks for path in stacks if "-rank-1" in path), stacks
    assert output.count("passing over a damaged checkpoint, kept as ") == len(list(folder.glob("damaged-*"))) == 1
    assert not list(folder.parent.rglob("stop-*"))

    expected = trainers.losses(trainers.train(cluster_line, "undisturbed", *SETTINGS, f"training.max_steps={steps}"))
    assert sorted(expected) == list(range(1, steps + 1))
    assert cluster_line.losses("drill") == pytest.approx(expected, abs=1e-5)  # another sample would show as 1e-2
    for row in drill.rows(expected):
        record(request, *row)


@pytest.mark.parametrize("name", [checkpoint.MODEL, "optimizer", checkpoint.COMMIT])
def test_a_damaged_checkpoint_is_passed_over(line: Line, name: str, request: pytest.FixtureRequest) -> None:
    settings = ("training.checkpoint_every=1", "training.zero_stage=2", "data.val=null")
    folder = trainers.train(line, "damaged", *settings, "training.max_steps=3")
    [file, *_] = sorted((folder / "step-00000003").glob(f"{name}*"))
    flip_a_bit(file)
    trainers.train(line, "damaged", *settings)
    assert list(folder.glob("damaged-step-00000003-*")), "it is kept apart"
    logged = [(m["step"], m["train/loss"]) for m in trainers.metrics(folder) if "train/loss" in m]
    assert [step for step, _ in logged] == [1, 2, 3, 3, 4, 5, 6], "the one before it was gone on from"
    assert logged[3][1] == logged[2][1], "a step that was redone has another loss"
    record(request, f"a flipped bit in {file.name}, at a start", "at once", "1", f"{abs(logged[3][1] - logged[2][1]):.1e}")


def test_without_a_whole_checkpoint_it_begins_again_with_the_weights_that_it_was_given(line: Line) -> None:
    given = trainers.train(line, "given", "data.val=null", "training.max_steps=1")
    settings = ("data.val=null", f"model.init={given}/step-00000001/{checkpoint.MODEL}")
    folder = trainers.train(line, "only", *settings, "training.max_steps=1")
    before = trainers.losses(folder)[1]
    flip_a_bit(folder / "step-00000001" / checkpoint.MODEL)
    with pytest.raises(AssertionError, match=r"no checkpoint in .* is whole"):
        trainers.train(line, "only", *settings, "training.max_steps=2")
    trainers.train(line, "only", *settings, "training.max_steps=2")
    assert trainers.losses(folder)[1] == before, "it began with other weights"
