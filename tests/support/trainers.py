"""A training without Ray: the same `Trainer` on gloo ranks forked from this process's own, in seconds instead of a minute.

What Ray does (start ranks, replace them, stop them) is tested with Ray; what a `Trainer` does on its own (resume, skip what
is corrupt, stop beyond a budget) is tested here.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.line import SMALL, Line
from tests.support.ranks import rendezvous, run_ranks
from vswin_dist.config import load_settings, to_flat
from vswin_dist.device import Rank
from vswin_dist.tracking import NullRun
from vswin_dist.training import hangs, progress, run_record
from vswin_dist.training.launch import worker_config
from vswin_dist.training.preflight import preflight
from vswin_dist.training.run_record import RunRecord
from vswin_dist.training.trainer import Trainer, WorkerConfig


class RecordedRun(NullRun):
    """Keeps what is logged, a line of JSON for each step, in `log.jsonl` of a folder."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.file = Path(folder) / "log.jsonl"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def train_rank(config: WorkerConfig, log: str | None = None) -> None:
    """Train on this rank; `log` is a folder other than that of the checkpoints."""
    rank = Rank(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    tracking = RecordedRun(log or config.checkpoints) if rank.is_main else NullRun()
    with (
        hangs.watched(config.checkpoints, rank, config.settings.training.hang_s) as heartbeat,
        progress.shown(config.checkpoints, rank, config.run.fence, heartbeat),
    ):
        Trainer.build(config, rank, tracking, lambda *_: None, heartbeat).run()


def train(
    line: Line,
    name: str,
    *settings: str,
    rank_function: Callable[..., None] = train_rank,
    arguments: Sequence[Any] = (),
) -> Path:
    """Train `name` on two ranks as `Line.train` does, or resume it; returns the folder of its checkpoints.

    Args:
        rank_function: what each rank runs, with the rank's configuration and `arguments`.

    Raises:
        AssertionError: a rank failed; holds its traceback.
    """
    own = (f"run.name={name}", f"storage.root={line.home}/runs", "tracking.uri=none")
    spec = preflight(load_settings("demo", [*own, *line.sets(), *SMALL, *settings]))
    settings = to_flat(spec.settings)
    record = RunRecord(NullRun().id, spec.train.fingerprint, settings, number=spec.number, steps=spec.last_step)
    run_record.write(spec.root, record)
    config = worker_config(spec, record, NullRun())
    run_ranks(spec.settings.training.workers, rank_function, config, *arguments)
    return Path(config.checkpoints)


def _enter(config: WorkerConfig, log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train_rank(config, log)
    dist.destroy_process_group()


@contextmanager
def mortal_ranks(config: WorkerConfig, log: Path, environment: Mapping[str, str]) -> Iterator[list[multiprocessing.Process]]:
    """Two ranks that train, with other variables of their environment; what is left of them ends with the block.

    What they log is added to `log.jsonl` in the folder `log`.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.rank_imports"])
    with rendezvous(2) as found:
        common = {**environment, **found}
        ranks = [
            context.Process(target=_enter, args=(config, str(log), {**common, "RANK": str(r), "LOCAL_RANK": str(r)}))
            for r in range(2)
        ]
        for rank in ranks:
            rank.start()
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Everything that was logged beside the checkpoints of `folder`, in its order; a step has several entries."""
    return [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    """step -> loss; the last one of a step that was done again."""
    return {m["step"]: m["train/loss"] for m in metrics(folder) if "train/loss" in m}
