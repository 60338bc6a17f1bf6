"""`make slurm-demo`: trainings on real Slurm, on hosts of this machine; a time limit is met, and a node killed.

They are submitted as a user of a cluster would: by `sbatch` from another host, with credentials in a file of mode 600. The
losses of both must be those of a training that nothing disturbs.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from infra.local import hosts, slurm
from infra.local.network import entered
from infra.local.record import Record, wait_until
from infra.local.secret_search import SecretSearch
from infra.local.trials import (
    BUCKET,
    MODEL,
    REPOSITORY,
    STEP,
    Disturbance,
    Trial,
    bucket,
    compare,
    ending,
    fill_bucket,
    losses,
)
from vswin_dist.errors import WorkFailed, run_command

TRAIN = (
    *("python", "jobs/train.py", "--recipe", "demo", f"data.train={BUCKET}/shards/train", f"storage.root={BUCKET}/runs"),
    *("training.checkpoint_every=5", f"tracking.register_as={MODEL}"),
)
WARNING_S = 180  # `--signal` of the script
TIMEOUT_S = 1800.0
LOOK_EVERY_S = 0.5
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
RAY_PROCESSES = ("ray::", "raylet", "gcs_server", "ray start", "host.sh")


@dataclass
class Submitted:
    """A job of Slurm: what it printed, and when."""

    number: str = ""
    lines: list[tuple[float, str]] = field(default_factory=list)
    states: list[tuple[float, str]] = field(default_factory=list)  # as they changed
    freed_s: float | None = None  # from its end until no process of Ray was left and all nodes were idle

    @property
    def output(self) -> str:
        """All that it printed."""
        return "\n".join(line for _, line in self.lines)

    def when(self, pattern: str) -> list[float]:
        """Return when lines came that match."""
        return [at for at, line in self.lines if re.search(pattern, line)]


@dataclass
class SlurmTrial(Trial):
    """Slurm on hosts of this machine, and what each step took and found."""

    epochs: int = 20  # of each training
    job: Submitted = field(default_factory=Submitted)  # the last one

    def submit(self, *job: str, meanwhile: Callable[[str], None] = lambda line: None) -> str:
        """Run a job on two nodes through `sbatch` to its end; its output is shown and returned.

        Raises:
            WorkFailed: it failed, or did not end.
        """
        own = hosts.disk(self.record, self.record.head)
        words = ["sbatch", "--parsable", "--nodes=2", "--time=60", f"--output={own}/%j.log", slurm.SCRIPT, *job]
        print(f"$ {shlex.join(words)}", flush=True)
        given = " ".join(f"{name}={value}" for name, value in user_environment(self.record).items())
        answer = slurm.call(self.record, "bash", "-c", f"cd {REPOSITORY} && {given} {shlex.join(words)}")
        self.job = Submitted(answer.strip())
        end = time.monotonic() + TIMEOUT_S
        while self.state() not in ENDED:
            self.show(meanwhile)
            if time.monotonic() > end:
                raise WorkFailed(f"the job does not end within {TIMEOUT_S:g} s; it is {self.job.states}")
            time.sleep(LOOK_EVERY_S)
        self.show(meanwhile)
        if self.job.states[-1][1] != "COMPLETED":
            raise WorkFailed(f"the job {shlex.join(job)} is {self.job.states[-1][1]}: its output stands above")
        return self.job.output

    def train(self, name: str, meanwhile: Callable[[str], None] = lambda line: None) -> dict[int, float]:
        """Train to the end; returns the losses."""
        settings = (f"run.name={name}", f"training.epochs={self.epochs}")
        return losses(self, self.submit(*TRAIN, *settings, meanwhile=meanwhile))

    def shown(self, name: str) -> str:
        """Return what Slurm says of the job under a name."""
        found = re.search(rf"\b{name}=(\S+)", slurm.call(self.record, "scontrol", "show", "job", "-o", self.job.number))
        return found[1] if found else ""

    def state(self) -> str:
        """Ask for the job's state, and note its changes."""
        now = self.shown("JobState")
        if now and (not self.job.states or self.job.states[-1][1] != now):
            self.job.states.append((time.monotonic(), now))
        return now

    def show(self, meanwhile: Callable[[str], None]) -> None:
        """Show the lines that the job has printed since the last look, whatever node they are on."""
        log = f"{hosts.disk(self.record, self.record.head)}/{self.job.number}.log"
        seen = {line: 0 for _, line in self.job.lines}
        for _, line in self.job.lines:
            seen[line] += 1
        for host in list(self.record.hosts.values())[1:]:
            for line in slurm.call(self.record, "cat", log, host=host).splitlines():
                if seen.get(line, 0):
                    seen[line] -= 1
                    continue
                print(line, flush=True)
                self.job.lines.append((time.monotonic(), line))
                if "the job ended with" in line:
                    self.wait_until_free()
                meanwhile(line)

    def wait_until_free(self) -> None:
        """Measure how long the hosts that are up stay busy after the job."""
        began = time.monotonic()
        nodes = sum(self.record.runs(name) for name in self.record.hosts) - 1

        def free() -> bool:
            idle = [state for state in slurm.states(self.record).values() if state == "idle"]
            return len(idle) == nodes and not any(ray_on(self.record, name) for name in self.record.hosts)

        if wait_until(free, 60):
            self.job.freed_s = time.monotonic() - began


def ray_on(record: Record, name: str) -> list[str]:
    """Return the command lines of Ray's processes on a host."""
    found = []
    if record.runs(name):
        for process in psutil.Process(record.processes[name][0]).children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            found += [line] if any(part in line for part in RAY_PROCESSES) else []
    return found


def user_environment(record: Record) -> dict[str, str]:
    """Return what a user sets before `sbatch`; nothing of it is secret."""
    own = hosts.disk(record, record.head)
    return {
        "MLFLOW_TRACKING_URI": record.services["mlflow"],
        "VSWIN_ENV": f"{own}/environment",
        "VSWIN_CREDENTIALS": f"{own}/credentials",
        "VSWIN_HOME": f"{own}/home/vswin",
        "VSWIN_CACHE": f"{own}/cache",
        "VSWIN_TMP": f"{own}/tmp",  # noqa: S108
        "VSWIN_OBJECT_STORE": str(hosts.OBJECT_STORE_BYTES),
    }


@dataclass
class Limit:
    """Lets the time limit of a job come into the middle of its training."""

    trial: SlurmTrial
    reached: int = 0  # step at which it was set
    search: SecretSearch = field(init=False)  # through what all users of a cluster can see

    def __post_init__(self) -> None:
        self.search = SecretSearch.of(self.trial.record)

    def __call__(self, line: str) -> None:
        """Look at a line of the training's output."""
        record, number = self.trial.record, self.trial.job.number
        if "the job ended with 130" in line:  # it has an hour again, as it was submitted
            slurm.call(record, "scontrol", "update", f"JobId={number}", "TimeLimit=60")
        if self.reached or not (step := STEP.search(line)) or int(step[1]) < int(step[2]) / 6:
            return
        self.reached = int(step[1])
        hours, minutes, seconds = map(int, self.trial.shown("RunTime").split(":"))
        limit = math.ceil((hours * 3600 + minutes * 60 + seconds + WARNING_S) / 60)
        print(f"--- the time limit is {limit} minutes", flush=True)
        slurm.call(record, "scontrol", "update", f"JobId={number}", f"TimeLimit={limit}")
        self.search.text("the job's listing", slurm.call(record, "scontrol", "show", "job", "--details", number))
        self.search.command_lines()


def prepare(trial: SlurmTrial) -> None:
    """Make the shards, as a job of Slurm as well."""
    with trial.step("prepare, on two nodes") as found:
        videos = f"{BUCKET}/raw/train"
        source = ("csv", "--index", f"{videos}/index.csv", "--videos", videos, "--path-column", "path")
        columns = ("--label-column", "label", "--classes", f"{BUCKET}/raw/classes.txt", "--short-side", "48")
        out = ("--name", MODEL, "--split", "train", "--out", f"{BUCKET}/shards/train")
        trial.submit("python", "jobs/prepare.py", *source, *columns, *out)
        found.append(f"{len(list(bucket(trial).glob('shards/train/*.tar')))} shards")


def train(trial: SlurmTrial) -> dict[int, float]:
    """Train on two nodes without a disturbance; returns the losses."""
    with trial.step("train, undisturbed") as found:
        alone = trial.train("undisturbed")
        found.append(freed(trial.job))
    return alone


def train_to_limit(trial: SlurmTrial, alone: dict[int, float]) -> None:
    """Train with a time limit in the middle.

    Raises:
        WorkFailed: it was not reached in the middle, the losses differ, or a secret can be seen.
    """
    limit = Limit(trial)
    with trial.step("train, the time limit in the middle") as found:
        limited = trial.train("limited", limit)
        found += [*went_on(trial.job, "told to stop: later"), freed(trial.job)]
        told, ended = trial.job.when("told to stop: later")[0], trial.job.when("the job ended with 130")[0]
        found.append(f"checkpoint and end {ended - told:.0f} s after the signal")
    trial.rows.append(("secrets that other users see", "", limit.search.check()))
    trial.rows.append(("its losses", "", f"differ by {compare(alone, limited):.1e} at most"))


def train_and_kill(trial: SlurmTrial, alone: dict[int, float]) -> None:
    """Train, with one of the two nodes killed.

    Raises:
        WorkFailed: the training did not go on, or the losses differ.
    """
    kill = Disturbance(trial.record, hosts.crash)
    with trial.step("train, a node killed") as found:
        killed = trial.train("killed", kill)
        kill.check()
        trial.job.lines.append((kill.at, f"{kill.host} was killed"))
        found += went_on(trial.job, "was killed")
        found += [freed(trial.job), f"on {trial.shown('NodeList')} without {kill.host}"]
    trial.rows.append(("its losses", "", f"differ by {compare(alone, killed):.1e} at most"))


def freed(job: Submitted) -> str:
    """Say how long the hosts were busy after the job's end.

    Raises:
        WorkFailed: they were not free in a minute.
    """
    if job.freed_s is None:
        raise WorkFailed("the hosts were not free within 60 s of the job's end")
    return f"hosts free {job.freed_s:.1f} s after its end"


def went_on(job: Submitted, what: str) -> list[str]:
    """Say how a job went on after a line that matches `what`.

    Raises:
        WorkFailed: it did not.
    """
    at = job.when(what)
    resumed = re.findall(r"resumed from \S*step-0*(\d+)", job.output)
    waiting = [(when, state) for when, state in job.states if at and when > at[0] and state == "PENDING"]
    again = [when for when, state in job.states if waiting and when > waiting[0][0] and state == "RUNNING"]
    if not at or not resumed or not again:
        raise WorkFailed(f"the job was not requeued in the middle of the training: {job.states}")
    steps = [when for when, line in job.lines if when > again[0] and STEP.search(line)]
    return [
        f"requeued {waiting[0][0] - at[0]:.0f} s and started {again[0] - at[0]:.0f} s after",
        f"resumed from step {resumed[-1]}",
        f"training {steps[0] - at[0]:.0f} s after",
    ]


def search_for_secrets(trial: SlurmTrial) -> None:
    """Look for every secret on the disks of all hosts, where jobs and Slurm leave what they wrote.

    Raises:
        WorkFailed: one stands somewhere; names the place.
    """
    with trial.step("search for secrets") as found:
        search = SecretSearch.of(trial.record)
        for host in trial.record.hosts.values():
            if trial.record.runs(host.name):
                kept = ("credentials", "munge.key")  # in mode 600
                search.below(hosts.disk(trial.record, host), *kept, enter=entered(trial.record, host))
        found.append(search.check())


def run(folder: Path, nodes: int, epochs: int) -> int:
    """Start Slurm, take the steps, end all of it, and print the table."""
    slurm.check()
    began = time.monotonic()
    record = slurm.up(folder, nodes)
    trial = SlurmTrial(record, epochs=epochs)
    trial.rows.append(("start Slurm", f"{time.monotonic() - began:.0f}", f"a controller, {nodes} nodes and 3 services"))
    with ending(trial, began):
        fill_bucket(trial)
        prepare(trial)
        alone = train(trial)
        train_to_limit(trial, alone)
        train_and_kill(trial, alone)
        search_for_secrets(trial)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/vswin-slurm"), help="of its hosts (%(default)s)")  # noqa: S108
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help="of Slurm, three or more (%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of each training (%(default)s)")
    args = parser.parse_args()
    if args.nodes < 3:
        parser.error(f"--nodes={args.nodes}: two train and one takes the place of the one that is killed")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hosts.stop)
    return run(args.folder.absolute(), args.nodes, args.epochs)


if __name__ == "__main__":
    sys.exit(run_command(main))
