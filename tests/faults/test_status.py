"""What is told of a training while it goes on, by ranks that are not asked."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from tests.support.line import SMALL, Line
from tests.support.trainers import mortal_ranks
from tests.support.waiting import wait_until
from vswin_dist import lease
from vswin_dist.config import load_settings, to_flat
from vswin_dist.status.trainings import Training, trainings
from vswin_dist.tracking import NullRun
from vswin_dist.training import run_record
from vswin_dist.training.launch import run_lease, worker_config
from vswin_dist.training.preflight import preflight
from vswin_dist.training.run_record import RunRecord


def test_two_ranks_train_and_one_of_them_hangs(line: Line, tmp_path: Path) -> None:
    own = ("run.name=mine", f"storage.root={line.home}/runs", "tracking.uri=none", "training.hang_s=5")
    long = ("training.epochs=2000", "data.val=null", "training.checkpoint_every=5")
    spec = preflight(load_settings("demo", [*own, *line.sets(), *SMALL, *long]))

    def told() -> Training:
        time.sleep(0.2)
        [found], problems = trainings([f"{line.home}/runs"])
        assert problems == []
        return found

    with run_lease(spec) as fence:
        record = RunRecord(NullRun().id, spec.train.fingerprint, to_flat(spec.settings), number=1, steps=spec.last_step)
        run_record.write(spec.root, record)
        config = worker_config(spec, record, NullRun())
        config = replace(config, run=replace(config.run, fence=fence))
        assert told().state == "waits"
        with mortal_ranks(config, tmp_path / "log", {}) as ranks:
            wait_until(lambda: (now := told()).step and now.checkpoint and now.clips_per_second)
            found = told()
            assert (found.state, found.ranks, found.steps) == ("training", 2, 2000 * 3)
            assert found.driver and found.driver.startswith(f"pid {os.getpid()} ")
            assert found.clips_per_second and found.clips_per_second > 0 and found.seconds_left
            assert found.checkpoint and found.checkpoint.step % 5 == 0 and found.checkpoint.age_s < 300
            stopped = ranks[1].pid
            assert stopped
            os.kill(stopped, signal.SIGSTOP)
            wait_until(lambda: told().state == "hangs" and "did not answer: rank 1 " in told().notes[0])
    assert told().state == "failed" and told().driver is None
    assert not lease.holder(f"{spec.root}/{lease.FOLDER}")[1].seems_alive  # type: ignore[union-attr]
