"""The main line as a user runs it: real commands on rendered videos, everything below a temporary folder."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from data_prep.cli import main as data_prep_main
from infra.local import motions
from tests.support import warm
from tests.support.waiting import Job

REPOSITORY = Path(__file__).parents[2]
SMALL = (
    "training.workers=2",
    "training.epochs=2",
    "optim.warmup_epochs=1",
    "data.workers=0",
    "evaluation.every_epochs=2",
    "evaluation.batch=8",
    "evaluation.report=false",
    "model.head_dropout=0.5",
    "model.drop_path_rate=0.2",
)


def make_shards(folder: Path, train: int = 52, val: int = 12) -> Path:
    """Rendered videos of six motions in shards `train` and `val` of `folder`; 3 steps an epoch of 16."""
    (folder / "classes.txt").write_text("".join(f"{m}\n" for m in motions.MOTIONS))
    for part, count, seed in (("train", train, 0), ("val", val, 1)):
        videos = motions.make_dataset(folder / "videos" / part, count, seed)
        code = data_prep_main(
            [
                "shard",
                "csv",
                "--index",
                str(videos / "index.csv"),
                "--videos",
                str(videos),
                "--path-column",
                "path",
                "--label-column",
                "label",
                "--short-side",
                "48",
                "--classes",
                str(folder / "classes.txt"),
                "--name",
                "motions",
                "--split",
                part,
                "--out",
                str(folder / part),
            ]
        )
        assert code == 0
    return folder


def own_lines(output: str) -> list[str]:
    """Return the lines of `output` that a command printed itself: those of its ranks come by Ray's log, sometimes later."""
    return [line for line in output.strip().splitlines() if not re.match(r"(\x1b\[\d+m)*\([^)]*pid=\d+", line)]


def running_actors(kind: str) -> list[psutil.Process]:
    """Return Ray's actors of a class that run below this process: on the shared cluster, or on a driver's own Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(kind in part for part in process.cmdline()):
                found.append(process)
    return found


def running_ranks() -> list[psutil.Process]:
    """Return the ranks of Ray Train among `running_actors`."""
    return running_actors("RayTrainWorker")


short_folders: list[Path] = []  # all that this process has made


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path, as Ray needs it for its sockets."""
    with tempfile.TemporaryDirectory(prefix="vs-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        short_folders.append(Path(folder))
        yield Path(folder)


@dataclass
class Line:
    """Where one test's trainings live: a data root of its own, and shards."""

    home: Path
    shards: Path
    ray_folder: Path  # where Ray puts its sockets, whose paths must be short
    env: dict[str, str] = field(default_factory=dict)
    anew: bool = (
        False  # each job and worker starts Python: what is imported, or read by an import, is of its own environment
    )

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "VSWIN_HOME": str(self.home),
            "RAY_TMPDIR": str(self.ray_folder),
            "OMP_NUM_THREADS": "1",
            "VSWIN_SOURCE_COMMIT": "test",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **({} if self._starts_anew else warm.for_ray()),
            **self.env,
        }

    @property
    def _starts_anew(self) -> bool:
        return self.anew or not warm.SERVER.used

    @property
    def uri(self) -> str:
        """The embedded MLflow store of this data root."""
        return f"sqlite:///{self.home}/mlflow/mlflow.db"

    def without_store(self) -> None:
        """Remove the empty store that is made ahead, where a test looks whether one comes to be there."""
        shutil.rmtree(self.home / "mlflow", ignore_errors=True)

    def sets(self) -> list[str]:
        return [f"data.train={self.shards}/train", f"data.val={self.shards}/val"]

    def start(self, job: str, *args: str, output: Path | None = None) -> Job:
        """Start `jobs/JOB.py` in a process group of its own, its output together in a pipe, or in the file `output`."""
        with contextlib.ExitStack() as stack:
            stdout = stack.enter_context(output.open("w")) if output else subprocess.PIPE
            python = [sys.executable] if self._starts_anew else warm.python(warm.SERVER.address())
            process = Job(
                [*python, str(REPOSITORY / "jobs" / f"{job}.py"), *args],
                cwd=self.home,
                env=self.environment,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            process.file = output
            return process

    @contextlib.contextmanager
    def running(self, job: str, *args: str, output: Path | None = None) -> Iterator[Job]:
        """As `start`; the process is killed where the block leaves it running."""
        process = self.start(job, *args, output=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def training(self, name: str, *settings: str) -> contextlib.AbstractContextManager[Job]:
        """As `running`, for what `train` runs."""
        return self.running("train", "--recipe", "demo", f"run.name={name}", *self.sets(), *SMALL, *settings)

    def run(self, job: str, *args: str, code: int = 0, timeout_s: float = 480) -> str:
        """Run `jobs/JOB.py` to its end; its output. Fails where it ends with another code than `code`."""
        if self._starts_anew:
            with self.running(job, *args) as process:
                output, _ = process.communicate(timeout=timeout_s)
                found = process.returncode
        else:
            said = self.ray_folder / "output"
            said.unlink(missing_ok=True)
            found = warm.run_script(REPOSITORY / "jobs" / f"{job}.py", args, self.home, self.environment, said, timeout_s)
            output = said.read_text()
        assert found == code, f"exit {found}, expected {code}:\n{output[-6000:]}"
        return output

    def train(self, name: str, *settings: str, code: int = 0) -> str:
        """Train swin_nano for six steps as `name`."""
        return self.run("train", "--recipe", "demo", f"run.name={name}", *self.sets(), *SMALL, *settings, code=code)

    def run_of(self, name: str, uri: str | None = None) -> Any:
        """The one MLflow run called `name`; fails where there are two."""
        from mlflow import MlflowClient

        client = MlflowClient(uri or self.uri)
        experiment = client.get_experiment_by_name("vswin")
        runs = client.search_runs([experiment.experiment_id], f"tags.mlflow.runName = '{name}'")
        assert len(runs) == 1, f"{len(runs)} runs are called {name}"
        return runs[0]

    def artifacts(self, name: str) -> list[str]:
        """The paths of the files of the one MLflow run called `name`, without those of its models."""
        [folder] = self.home.glob(f"mlflow/artifacts/{self.run_of(name).info.run_id}/artifacts")
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def history(self, name: str, metric: str, uri: str | None = None) -> dict[int, float]:
        """step -> value of a metric in the one MLflow run called `name`; fails where a step stands twice."""
        from mlflow import MlflowClient

        history = MlflowClient(uri or self.uri).get_metric_history(self.run_of(name, uri).info.run_id, metric)
        assert len({m.step for m in history}) == len(history), "a step was logged twice"
        return {m.step: m.value for m in history}

    def losses(self, name: str, uri: str | None = None) -> dict[int, float]:
        """step -> loss in the one MLflow run called `name`."""
        return self.history(name, "train/loss", uri)
