"""What a user does with a cluster on this machine, from outside: jobs on rendered videos, while hosts may fail."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from infra.local import hosts, motions, services
from infra.local.cluster import RAY, run_shown
from infra.local.record import Host, Record, marked
from vswin_dist.errors import WorkFailed
from vswin_dist.tracking.provenance import source_version

REPOSITORY = Path(__file__).parents[2]
TRAIN_VIDEOS, VAL_VIDEOS = 240, 60  # 15 steps of an epoch of 16
BUCKET = f"s3://{services.DATA_BUCKET}"
MODEL = "motions"
TRAIN = (  # 60 steps, without a validation
    *("python", "jobs/train.py", "--recipe", "demo", "training.epochs=4", "optim.warmup_epochs=1"),
    *("evaluation.every_epochs=4", "training.checkpoint_every=5", f"storage.root={BUCKET}/runs"),
    f"data.train={BUCKET}/shards/train",
)
SAME = 1e-5  # what losses may differ by on other numbers of ranks
STEP = re.compile(r"step +(\d+)/(\d+)")


@dataclass
class Trial:
    """A cluster, and what each step on it took and found."""

    record: Record
    rows: list[tuple[str, ...]] = field(default_factory=lambda: [("step", "seconds", "what came of it")])

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; what is put into the list is shown beside it."""
        print(f"\n=== {name}", flush=True)
        began, found = time.monotonic(), list[str]()
        yield found
        self.rows.append((name, f"{time.monotonic() - began:.0f}", ", ".join(found)))

    def client(self) -> dict[str, str]:
        """Return what a user of this cluster needs."""
        return hosts.client_environment(self.record)

    def submit(self, *job: str, meanwhile: Callable[[str], None] = lambda line: None) -> str:
        """Run a job through `ray job submit` to its end, its output shown and returned.

        Args:
            meanwhile: is given each line of the output as it comes.

        Raises:
            WorkFailed: it failed.
        """
        code, output = self.attempt(*job, meanwhile=meanwhile)
        if code:
            raise WorkFailed(f"the job {shlex.join(job)} failed: its output stands above")
        return output

    def attempt(self, *job: str, meanwhile: Callable[[str], None] = lambda line: None) -> tuple[int, str]:
        """Run a job through `ray job submit` to its end; returns its exit code and its output, which is shown."""
        return self._ray("submit", *self._given(), "--", *job, meanwhile=meanwhile)

    @contextmanager
    def running(self, name: str, *job: str) -> Iterator[None]:
        """Keep a job running for the time of the block, and stop it by `ray job stop`.

        Raises:
            WorkFailed: it was not taken, or could not be stopped.
        """
        if self._ray("submit", "--no-wait", f"--submission-id={name}", *self._given(), "--", *job)[0]:
            raise WorkFailed(f"the job {shlex.join(job)} was not taken: the answer stands above")
        try:
            yield
        finally:
            code, _ = self._ray("stop", name)
        if code:
            raise WorkFailed(f"the job {name} was not stopped: the answer stands above")

    def _given(self) -> list[str]:
        """Return what is given to every job: its folder and its environment."""
        given = {"MLFLOW_TRACKING_URI": self.client()["MLFLOW_TRACKING_URI"]}
        given["VSWIN_SOURCE_COMMIT"] = source_version(REPOSITORY)
        return ["--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": given})]

    def _ray(self, *words: str, meanwhile: Callable[[str], None] = lambda line: None) -> tuple[int, str]:
        """Call `ray job` as a user outside does; returns its exit code and its output, which is shown."""
        print(f"$ ray job {shlex.join(words)}", flush=True)
        client, own = self.client(), services.base_environment(self.record)
        outside = {name: client[name] for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        return run_shown([RAY, "job", *words], REPOSITORY, {**own, "PYTHONUNBUFFERED": "1", **outside}, meanwhile)


@contextmanager
def ending(trial: Trial, began: float) -> Iterator[None]:
    """End all that the trial stands on when the block is left; one that came to its end is told as a table.

    Args:
        began: when it was begun to be started, by `time.monotonic`.

    Raises:
        WorkFailed: a process is left.
    """
    folder = trial.record.folder
    try:
        yield
    finally:
        ended = time.monotonic()
        hosts.down(folder)
    if left := list(marked(folder)):
        raise WorkFailed(f"these processes are left: {left}")
    trial.rows.append(("end all of it", f"{time.monotonic() - ended:.0f}", "no process, network or file is left"))
    trial.rows.append(("in all", f"{time.monotonic() - began:.0f}", ""))
    print(f"\n{hosts.table(trial.rows)}")


def ranks_on(record: Record, host: Host) -> int:
    """Return how many ranks of trainings run on a host."""
    if not record.runs(host.name):
        return 0
    found = 0
    for process in psutil.Process(record.processes[host.name][0]).children(recursive=True):
        try:
            found += any("RayTrainWorker" in part for part in process.cmdline())
        except psutil.NoSuchProcess:
            continue
    return found


@dataclass
class Disturbance:
    """Does something to a host once a training is a third done, and notes how long it takes to go on."""

    record: Record
    act: Callable[[Record, Host], object]
    on_head: bool = False  # else on a host with a rank
    placed: dict[str, int] = field(default_factory=dict)  # host -> ranks, just before
    host: str = ""  # which it was; "" while nothing was done
    at: float = 0.0
    reached: int = 0  # step at which it was done
    stood_still_s: float | None = None

    def __call__(self, line: str) -> None:
        """Look at a line of the training's output."""
        if not (found := STEP.search(line)):
            return
        step, last = int(found[1]), int(found[2])
        if self.host and self.stood_still_s is None and step > self.reached:
            self.stood_still_s = time.monotonic() - self.at
        if not self.host and last / 3 <= step < last:
            ranks = {host.name: ranks_on(self.record, host) for host in self.record.hosts.values()}
            self.placed = {name: count for name, count in ranks.items() if count}
            if self.placed:
                host = self.record.head if self.on_head else self.record.hosts[max(self.placed)]
                self.host, self.at, self.reached = host.name, time.monotonic(), step
                print(f"--- {getattr(self.act, '__name__', 'done')}: {host.name}", flush=True)
                self.act(self.record, host)

    def check(self) -> None:
        """Refuse what was no disturbance of two ranks on two hosts.

        Raises:
            WorkFailed: says so.
        """
        if sorted(self.placed.values()) != [1, 1]:
            raise WorkFailed(f"two ranks on two hosts were to be disturbed: ranks were on {self.placed}")


def fill_bucket(trial: Trial) -> None:
    """Put the videos into the bucket, as whoever has them would."""
    with trial.step("render videos into the bucket") as found:
        for part, count, seed in (("train", TRAIN_VIDEOS, 0), ("val", VAL_VIDEOS, 1)):
            motions.make_dataset(bucket(trial) / "raw" / part, count, seed)
        (bucket(trial) / "raw/classes.txt").write_text("".join(f"{m}\n" for m in motions.MOTIONS))
        found.append(f"{TRAIN_VIDEOS + VAL_VIDEOS} videos")


def bucket(trial: Trial) -> Path:
    """Return the folder that the S3 server serves as the bucket."""
    return trial.record.folder / "s3" / services.DATA_BUCKET


def prepare(trial: Trial, job: tuple[str, ...] = ("python", "jobs/prepare.py")) -> None:
    """Make the shards of both sets, by a job on the hosts unless told."""
    with trial.step("prepare") as found:
        for part in ("train", "val"):
            videos = f"{BUCKET}/raw/{part}"
            source = ("csv", "--index", f"{videos}/index.csv", "--videos", videos, "--path-column", "path")
            columns = ("--label-column", "label", "--classes", f"{BUCKET}/raw/classes.txt", "--short-side", "48")
            target = ("--name", MODEL, "--split", part, "--out", f"{BUCKET}/shards/{part}")
            trial.submit(*job, *source, *columns, *target)
        shards = list(bucket(trial).glob("shards/*/*.tar"))
        found.append(f"{len(shards)} shards, {sum(path.stat().st_size for path in shards) / 1e6:.1f} MB")


def losses(trial: Trial, output: str) -> dict[int, float]:
    """Ask MLflow for the losses of the training that printed `output`, by step."""
    [run] = set(re.findall(r"^run_id +(\w+)", output, re.MULTILINE))
    client = trial.client()
    account = (client["MLFLOW_TRACKING_USERNAME"], client["MLFLOW_TRACKING_PASSWORD"])
    history = f"/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key=train/loss"
    _, answer = services.ask(client["MLFLOW_TRACKING_URI"] + history, account)
    return {int(m.get("step", 0)): float(m["value"]) for m in json.loads(answer)["metrics"]}


def compare(alone: dict[int, float], together: dict[int, float]) -> float:
    """Return the largest difference of two trainings' losses.

    Raises:
        WorkFailed: it is too large, or the trainings differ in their steps.
    """
    if alone.keys() != together.keys():
        raise WorkFailed(f"one training has {len(alone)} steps, the other {len(together)}")
    apart = max(abs(alone[step] - together[step]) for step in alone)
    if apart > SAME:
        raise WorkFailed(f"the losses of the two trainings differ by {apart:.1e}, more than {SAME:g}")
    return apart
